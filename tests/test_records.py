"""The records tools: what they read, draw and write, and that they refuse what cannot be trusted."""

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import pairwise

import make_record
import matplotlib.image
import numpy as np
import plot
import pytest
import run_log
import stats
from conftest import CONFORMANCE, EVAL_ARTIFACT, ROOT, run_script, write_shard

import train_gpt as tg

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
RULE = "=" * 100
DOCUMENTS = [90, 300, 1000, 2500, 5000, 7200]  # predictions in each
BEFORE, ROW, PIECE = (
    7,
    512,
    256,
)  # tokens before the first BOS, in a row of the flat stream, in a row of a scores file
TARGETS, TEXT = (
    BEFORE + sum(DOCUMENTS),
    sum(int(2.5 * n) for n in DOCUMENTS),
)  # tokens; bytes of the documents
LADDER = ("flat", "doc", "stride", "ttt")


def digest(content):
    return hashlib.sha256(content).hexdigest()


def scores_rows(conditions, seed):
    """Rows of a scores file: losses fall along the document, a little more from one condition to the next."""
    rng = np.random.default_rng(seed)
    for rank, condition in enumerate(conditions):
        left = sum(DOCUMENTS)
        if condition == "flat":
            yield condition, -1, 0, 0, BEFORE, 11, 30.5
            left = TARGETS // ROW * ROW - BEFORE
        for doc, length in enumerate(DOCUMENTS):
            for piece, start in enumerate(range(0, min(length, left), PIECE)):
                tokens = min(PIECE, length - start, left - start)
                loss = (
                    2.9
                    - 0.02 * rank
                    - 0.03 * rank * math.log1p(start / 256)
                    + 0.01 * rng.standard_normal()
                )
                yield condition, doc, piece, start, tokens, int(2.5 * tokens), tokens * loss
            left -= length


def write_run(folder, seed=1337, conditions=LADDER, **given):
    """A log as train_gpt.py writes it, with its scores file beside it. Returns the log's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = list(scores_rows(conditions, seed))
    scores = folder / f"scores{seed}.csv"
    scores.write_text(
        "condition,doc,chunk,start,tokens,bytes,loss_nats\n"
        + "".join(",".join(map(str, row)) + "\n" for row in rows)
    )
    preset = {
        name.upper(): tg.spell(value)
        for name, value in (asdict(tg.Config()) | tg.PRESETS["cpu"]).items()
    }
    given = {
        "DATA_PATH": "my files/data/demo",
        "OUT_DIR": str(folder),
        "RUN_ID": f"run{seed}",
        "SEED": str(seed),
        "EVAL": ",".join(conditions),
        "SCORES_PATH": str(scores),
        "MAX_WALLCLOCK_SECONDS": "175",
    } | given
    config = preset | {"PRESET": "cpu", "DEVICE": "cpu"} | given
    config["MAX_WALLCLOCK_SECONDS"] = str(float(config["MAX_WALLCLOCK_SECONDS"]))
    given, shown = (
        " ".join(f"{k}={shlex.quote(v)}" for k, v in pairs.items()) for pairs in (given, config)
    )
    code, model, steps = len(SOURCE.encode()), 1441734 + seed, 1200 + seed % 10
    lines = [
        "started:2026-11-22T16:03:11Z",
        f"command: {given} torchrun --standalone --nproc_per_node=2 train_gpt.py",
        f"config: {shown}",
        "versions: python:3.11.2 torch:2.13.0+cpu numpy:2.4.6 sentencepiece:0.2.3",
        f"preset:{config['PRESET']} device:cpu world_size:2 dtype:torch.bfloat16 (processor has avx512_bf16)",
        "data:./data/demo tokenizer:./data/demo/tokenizer.model log:x.txt",
        f"sha256 script:{digest(SOURCE.encode())}",
        f"sha256 tokenizer:{'a' * 64}",
        f"sha256 val:{'b' * 64} fineweb_val_000000.bin",
        f"audit bytes: documents:{len(DOCUMENTS)} of:{len(DOCUMENTS)} table_bytes:{TEXT} text_bytes:{TEXT} PASS",
        f"val_documents:{len(DOCUMENTS)} predictions:{sum(DOCUMENTS)} documents_of_one_token:0",
        "compile:started",
        "compile:done time:58.7s",
    ]
    for step in [*range(1, 11), *range(50, steps, 50)]:
        loss = 2.6 + 4.3 * math.exp(-step / 150) + 0.4 * math.sin(step * seed)
        lines.append(
            f"step:{step}/20000 train_loss:{loss:.4f} train_time:{145 * step}ms step_avg:145.00ms"
        )
    time = f"train_time:{145 * steps}ms"
    lines += [
        f"stopping_early: wallclock_cap {time} step:{steps}/20000",
        "Serialized model: 4351717 bytes",
        f"Code size: {code} bytes",
        f"Total submission size: {4351717 + code} bytes",
        f"Serialized model int8+zlib: {model} bytes (payload:1593392 raw_torch:1609162 payload_ratio:2.72x)",
        f"Total submission size int8+zlib: {model + code} bytes",
        f"step:{steps}/20000 val_loss:2.8000 val_bpb:1.6158 {time} step_avg:145.00ms",
        f"sha256 artifact:{digest(str(seed).encode())} final_model.int8.ptz",
        f"submission_size:{model + code} budget:16000000 headroom:{16000000 - model - code} PASS",
    ]
    first = None
    for condition in conditions:
        tokens, count, nats = (
            math.fsum(row[at] for row in rows if row[0] == condition) for at in (4, 5, 6)
        )
        loss, bpb = nats / tokens, nats / math.log(2) / count
        first = first or bpb
        final = f"val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:3454ms"
        before = 0 if condition == "flat" else BEFORE
        if condition in ("ttt", conditions[-1]):
            lines.append(
                f"audit causality: condition:{condition} documents:3 compared:512 time:432ms PASS"
            )
        lines += [
            f"audit coverage: condition:{condition} targets:{TARGETS} scored_once:{tokens:.0f} "
            f"before_first_bos:{before} after_last_row:{TARGETS - before - tokens:.0f} beyond_max_val_docs:0 PASS",
            f"ladder condition:{condition} val_loss:{loss:.6f} val_bpb:{bpb:.6f} delta_bpb:{bpb - first:+.4f} "
            f"docs:{len(DOCUMENTS)} tokens:{tokens:.0f} bytes:{count:.0f} eval_time:3454ms",
            *{
                "flat": [
                    f"final_int8_zlib_roundtrip {final}",
                    f"final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
                ],
                "ttt": [f"final_int8_ttt_lora {final}"],
            }.get(condition, []),
        ]
    lines.append(f"scores:{scores} rows:{len(rows)} sha256:{digest(scores.read_bytes())}")
    suffix = " partial" if config["MAX_VAL_DOCS"] != "0" else ""
    head = [
        SOURCE,
        RULE,
        "Running Python 3.11.2 (main)",
        "Running PyTorch 2.13.0+cpu",
        "AMD EPYC, 2 cores, 2 threads",
    ]
    path = folder / f"run{seed}.txt"
    path.write_text(
        "\n".join([*head, RULE, *(line + suffix for line in lines)]) + "\n", encoding="utf-8"
    )
    return path


def edit(path, pattern, new):
    """Change what one pattern matches below the head of a log; ^ and $ are those of a line."""
    head, body = path.read_text(encoding="utf-8").rsplit(RULE + "\n", 1)
    body, count = re.subn(pattern, new, body, flags=re.MULTILINE)
    assert count, f"nothing to edit: {pattern}"
    path.write_text(head + RULE + "\n" + body, encoding="utf-8")


def refusal(call, *arguments):
    """The one line with which a call refuses."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Logs of three seeds; nobody changes them."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder, seed) for seed in (1338, 1337, 1339)]


@pytest.fixture(scope="module")
def record(runs, tmp_path_factory):
    """A record of them; nobody changes it."""
    return make_record.make_record("try-1", 1.6, runs, tmp_path_factory.mktemp("records"))


# --- Logs ------------------------------------------------------------------------------------------------------------


def test_a_log_says_what_was_written(runs):
    log = run_log.read_log(runs[1])
    assert log.source == SOURCE and not log.partial
    assert (
        log.seed == 1337
        and log.config["DATA_PATH"] == "my files/data/demo"
        and log.config["MODEL_PATH"] == ""
    )
    assert log.hardware == "AMD EPYC, 2 cores, 2 threads" and log.started == "2026-11-22T16:03:11Z"
    assert log.command.startswith("DATA_PATH='my files/data/demo' OUT_DIR=")
    assert log.command.endswith(
        " MAX_WALLCLOCK_SECONDS=175 torchrun --standalone --nproc_per_node=2 train_gpt.py"
    )
    assert (log.preset, log.device, log.world_size, log.dtype) == (
        "cpu",
        "cpu",
        2,
        "torch.bfloat16",
    )
    assert (log.tokenizer_hash, log.val_hashes) == ("a" * 64, {"fineweb_val_000000.bin": "b" * 64})
    assert log.artifact_hash == digest(b"1337") and log.script_hash == digest(SOURCE.encode())
    code = len(SOURCE.encode())
    assert log.sizes == run_log.Sizes(
        model=1443071, code=code, total=1443071 + code, budget=16000000
    )
    assert [rung.condition for rung in log.ladder] == [*LADDER] and log.score.condition == "ttt"
    assert log.causal == ("ttt",) and (log.ladder[1].tokens, log.ladder[1].bytes) == (
        sum(DOCUMENTS),
        TEXT,
    )
    assert log.ladder[0].tokens == TARGETS // ROW * ROW
    assert len(log.training) == 10 + 1207 // 50 and log.training[10].step == 50
    assert log.validation == (run_log.Point(1207, 2.8, 145 * 1207),)
    assert log.scores == (
        str(runs[1].with_name("scores1337.csv")),
        digest(runs[1].with_name("scores1337.csv").read_bytes()),
    )


@pytest.mark.parametrize(
    "conditions", [("flat",), ("doc", "stride"), ("ttt", "flat"), (*LADDER, "new")]
)
def test_eval_says_which_scores_a_log_has(tmp_path, conditions):
    log = run_log.read_log(write_run(tmp_path, conditions=conditions))
    assert [rung.condition for rung in log.ladder] == list(conditions)


SCORE = r"val_loss:\S+ val_bpb:\S+"
UNTRUSTWORTHY = {
    "source": (r"^sha256 script:.", "sha256 script:x", "sha256 script:"),
    "other source": (r"^sha256 script:.*", f"sha256 script:{'0' * 64}", f"expected {'0' * 64}"),
    "no start": (r"^started:.*\n", "", "0 lines 'started:'"),
    "two starts": (r"^(started:.*\n)", r"\1\1", "2 lines 'started:'"),
    "bad start": (r"^started:.*", "started:yesterday", "'started:yesterday'"),
    "no shard": (r"^sha256 val:.*\n", "", "one for each validation shard"),
    "shard twice": (
        r"^(sha256 val:)b+( .*)$",
        rf"\g<0>\n\1{'c' * 64}\2",
        "2 lines 'sha256 val:' with 1 names",
    ),
    "quotes": (r"(config:.*)'my files/data/demo'", r"\1'my files/data/demo", "quoted as a shell"),
    "command's quotes": (
        r"(command:.*)'my files/data/demo'",
        r"\1'my files/data/demo",
        "quoted as a shell",
    ),
    "no EVAL": (r" EVAL=\S+", "", "EVAL=None"),
    "odd seed": (r" SEED=\d+", " SEED=x", "SEED=x"),
    "odd cap": (r"SECONDS=\S+", "SECONDS=soon", "MAX_WALLCLOCK_SECONDS=soon"),
    "command's seed": (r"^(command:.*) SEED=\d+", r"\1 SEED=9", "found SEED=9; expected SEED=1338"),
    "command's cap": (
        r"^(command:.*SECONDS)=\d+",
        r"\1=600",
        "SECONDS=600; expected MAX_WALLCLOCK_SECONDS=175.0",
    ),
    "command's path": (
        r"^(command:.*) OUT_DIR=\S+",
        r"\1 OUT_DIR=x",
        "found OUT_DIR=x; expected OUT_DIR=/",
    ),
    "unknown setting": (r"^command:", "command: LUCK=1", "found LUCK=1; expected LUCK=None"),
    "launcher": (r"^(command:.*) train_gpt.py", r"\1 other.py", "train_gpt"),
    "ranks": (r"world_size:2", "world_size:8", "world_size:8"),
    "preset": (r"^preset:cpu", "preset:baseline", "PRESET=baseline; expected PRESET=cpu"),
    "device": (r"device:cpu", "device:cuda:0", "DEVICE=cuda; expected DEVICE=cpu"),
    "dtype": (r" DTYPE=auto", " DTYPE=float32", "DTYPE=bfloat16; expected DTYPE=float32"),
    "validated too early": (
        r"^step:1208(/20000 val_)",
        r"step:1207\1",
        "steps [1207]; expected steps that rise, the",
    ),
    "validated twice": (r"^(step:1208)(/20000 val_.*)$", r"\g<0>\n\g<0>", "steps [1208, 1208]"),
    "validated later": (
        r"^(step:1208)(/20000 val_.*)$",
        r"\g<0>\nstep:1209\2",
        "steps [1208, 1209]",
    ),
    "never validated": (r"^step:.*val_bpb.*\n", "", "steps []"),
    "cap unsaid": (r"^stopping_early.*\n", "", "the last of them [20000]"),
    "missing rung": (r"^ladder condition:doc .*\n", "", "ladder lines for 'flat,stride,ttt'"),
    "order": (r"EVAL=flat,doc", "EVAL=doc,flat", "'doc,flat,stride,ttt', in that order"),
    "nan": (r"^(ladder condition:doc) val_loss:\S+", r"\1 val_loss:nan", "val_loss:nan"),
    "bits": (r"^(ladder condition:doc .* tokens:)\d+", r"\g<1>16091", "/ ln 2 * 16091 tokens"),
    "no bytes": (r"^(ladder condition:doc .* bytes:)\d+", r"\g<1>0", "bytes:0"),
    "delta": (
        r"^(ladder condition:doc .*) delta_bpb:\S+",
        r"\1 delta_bpb:-0.0999",
        "delta_bpb:-0.0999",
    ),
    "no flat line": (
        r"^final_int8_zlib_roundtrip .*\n",
        "",
        "expected 'final_int8_zlib_roundtrip, ",
    ),
    "no exact line": (
        r"^final_int8_zlib_roundtrip_exact .*\n",
        "",
        "final_int8_zlib_roundtrip_exact",
    ),
    "no ttt line": (r"^final_int8_ttt_lora .*\n", "", "final_int8_ttt_lora"),
    "a line too many": (
        r"^(final_int8_ttt_)lora (.*)$",
        r"\g<0>\n\1stream \2",
        "final_int8_ttt_lora, final_int8_ttt_",
    ),
    "other score": (
        rf"^(final_int8_ttt_lora) {SCORE}",
        r"\1 val_loss:2.0000 val_bpb:1.0000",
        "expected the ladder's",
    ),
    "other exact": (
        r"^(final_int8_zlib_roundtrip_exact .*)\d\d\d\d$",
        r"\g<1>9999",
        "expected the ladder's",
    ),
    "bytes audit": (r"^(audit bytes.*) PASS", r"\1 FAIL", "FAIL"),
    "no bytes audit": (r"^audit bytes.*\n", "", "0 lines 'audit bytes: '"),
    "other text": (r"^(audit bytes.*text_bytes:)\d+", r"\g<1>9", "as many bytes in the table"),
    "other documents": (
        r"^(audit bytes.*)table_bytes:\d+ text_bytes:\d+",
        r"\1table_bytes:9 text_bytes:9",
        "bytes:9,",
    ),
    "coverage audit": (r"^(audit coverage: condition:ttt.*) PASS", r"\1 FAIL", "FAIL"),
    "no coverage": (
        r"^audit coverage: condition:ttt.*\n",
        "",
        "expected one for each of 'flat,doc,stride,ttt'",
    ),
    "covered": (
        r"^(audit coverage: condition:ttt.* scored_once:)\d+",
        r"\g<1>9",
        "expected scored_once:16090",
    ),
    "left out": (
        r"^(audit coverage: condition:ttt.* after_last_row:)\d+",
        r"\g<1>9",
        "after_last_row:9",
    ),
    "covered, not scored": (
        r"scored_once:15872 (.*)after_last_row:225",
        r"scored_once:15873 \1after_last_row:224",
        "expected scored_once:15872",
    ),
    "any audit": (r"^audit bytes", "audit luck: FAIL\naudit bytes", "'audit luck: FAIL'"),
    "causality audit": (r"^(audit causality.*) PASS", r"\1 FAIL", "FAIL"),
    "code size": (r"^Code size: .*", "Code size: 5 bytes", "'Code size: 5 bytes'"),
    "model size": (
        r"^Serialized model int8\+zlib: \d+",
        "Serialized model int8+zlib: 5",
        "model 5 + code",
    ),
    "total size": (r"^submission_size:\d+", "submission_size:5", "of 5 bytes"),
    "verdict": (r"^(submission_size.*) PASS", r"\1 FAIL", "PASS where it is not below 0"),
    "headroom": (r"^(submission_size.*headroom:)\d+", r"\g<1>9", "headroom:9 PASS"),
    "no artifact": (r"^sha256 artifact:.*\n", "", "0 lines 'sha256 artifact:'"),
    "stopped": (r"^Serialized model int8(.|\n)*", "error: disk full", "'error: disk full'"),
}


@pytest.mark.parametrize("case", UNTRUSTWORTHY)
def test_a_log_that_cannot_be_trusted_is_refused(runs, tmp_path, case):
    path = tmp_path / "run.txt"
    shutil.copy(runs[0], path)
    pattern, new, message = UNTRUSTWORTHY[case]
    edit(path, pattern, new)
    line = refusal(run_log.read_log, path)
    assert line.startswith(f"{path}: found ") and "; expected " in line and message in line


def test_a_source_that_was_edited_is_refused(runs, tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(runs[0].read_text().replace("rms_norm", "rms_nomr"))
    assert "a source text with sha256" in refusal(run_log.read_log, path)


def test_two_runs_in_one_log_and_no_log_are_refused(runs, tmp_path):
    path = tmp_path / "run.txt"
    path.write_bytes(runs[0].read_bytes() + runs[1].read_bytes())
    assert "found 4 lines of 100 '='" in refusal(run_log.read_log, path)
    path.write_text(SOURCE)
    assert "found 0 lines of 100 '='" in refusal(run_log.read_log, path)
    path.write_bytes(b"\xff")
    assert "not UTF-8" in refusal(run_log.read_log, path)


@pytest.mark.parametrize("of", [6, 7])
def test_isolated_conditions_score_the_same_documents(tmp_path, of):
    """Whether or not the audit of bytes saw all documents. Two of five tokens fewer leave bits per byte as they are."""
    path, fewer = write_run(tmp_path), f"tokens:{sum(DOCUMENTS) - 2} bytes:{TEXT - 5}"
    edit(path, r"^(audit bytes.*) of:6", rf"\1 of:{of}")
    edit(path, r"^(ladder condition:stride .*) tokens:\d+ bytes:\d+", rf"\1 {fewer}")
    edit(
        path,
        r"^(audit coverage: condition:stride .*once:)\d+(.*last_row:)0",
        rf"\g<1>{sum(DOCUMENTS) - 2}\g<2>2",
    )
    found = f"found condition:stride {fewer}; expected tokens:{sum(DOCUMENTS)} bytes:{TEXT}"
    assert found in refusal(run_log.read_log, path)


def test_isolated_conditions_score_the_same_tokens(tmp_path):
    """The bytes are those of all documents, and a loss that makes up for the missing tokens keeps bits per byte."""
    path, fewer = write_run(tmp_path), sum(DOCUMENTS) - 2
    loss = run_log.read_log(path).ladder[2].val_loss * sum(DOCUMENTS) / fewer
    edit(
        path,
        r"^(ladder condition:stride val_loss:)\S+(.* tokens:)\d+",
        rf"\g<1>{loss:.6f}\g<2>{fewer}",
    )
    edit(
        path,
        r"^(audit coverage: condition:stride .*once:)\d+(.*last_row:)0",
        rf"\g<1>{fewer}\g<2>2",
    )
    assert f"found condition:stride tokens:{fewer} bytes:{TEXT}; expected" in refusal(
        run_log.read_log, path
    )


def test_what_the_program_may_print_is_read(tmp_path):
    path = write_run(tmp_path, MAX_WALLCLOCK_SECONDS="1e-05")
    edit(path, r"^command:", "command: PRESET=auto DEVICE=auto GRAD_ACCUM_STEPS=0")
    edit(
        path,
        r"^(audit bytes.*)of:6 table_bytes:\d+ text_bytes:\d+",
        r"\1of:7 table_bytes:9 text_bytes:9",
    )
    edit(path, r"final_model.int8.ptz", "my model.ptz")
    edit(path, r"fineweb_val_000000.bin", "fineweb_val_my own.bin")
    log = run_log.read_log(path)
    assert log.config["MAX_WALLCLOCK_SECONDS"] == "1e-05" and [*log.val_hashes] == [
        "fineweb_val_my own.bin"
    ]
    edit(path, r"^command:.* torchrun.*", "command: python train_gpt.py")
    edit(path, r"world_size:2", "world_size:1")
    assert run_log.read_log(path).command == "python train_gpt.py"
    edit(path, r"^stopping_early.*\n", "")
    edit(path, r" ITERATIONS=20000", " ITERATIONS=1207")  # the last step was the last
    assert run_log.read_log(path).validation[-1].step == 1207


def test_numbers_agree_within_the_digits_they_show():
    agree = lambda a, b: run_log.agree(run_log.Decimal(a), run_log.Decimal(b))  # noqa: E731
    assert (
        agree("3.0804", "3.080409")
        and agree("3.0804", "3.080450")
        and agree("1.91871911", "1.918719")
    )
    assert not agree("3.0804", "3.080452") and not agree("1.91871961", "1.918719")


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_statistics_of_the_published_runs():
    command = [
        sys.executable,
        ROOT / "records/stats.py",
        "1.1927",
        "1.1935",
        "1.1921",
        "1.1929",
        "--threshold",
        "1.195",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.stdout == "n:4 mean:1.1928 std:0.0005 threshold:1.195 p_value:0.00234486\n"
        and not done.stderr
    )


@pytest.mark.filterwarnings("error")
def test_equal_scores_have_a_p_value():
    assert stats.summarize([1.1, 1.1, 1.1], 1.2) == stats.Summary(3, 1.1, 0.0, 1.2, 0.0)
    assert (
        stats.summarize([1.1, 1.1, 1.1], 1.1).p_value
        == stats.summarize([1.1, 1.1], 1.0).p_value
        == 1.0
    )


@pytest.mark.parametrize("arguments", [["1.1"], ["1.1", "nan"], ["1.1", "inf"]])
def test_statistics_refuse_in_one_line(capsys, arguments):
    assert stats.main([*arguments, "--threshold", "1.2"]) == 1
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"error: found .*; expected .*\n", err)
    assert stats.main(["1.1", "1.2", "--threshold", "nan"]) == 1


# --- Pictures --------------------------------------------------------------------------------------------------------


def assert_pictures(folder, *names):
    """The folder's PNG files are these, of a size for people, with something on them."""
    assert sorted(path.name for path in folder.glob("*")) == sorted(names)
    for name in names:
        image = matplotlib.image.imread(folder / name)
        assert image.shape[1] == 1280 and 300 < image.shape[0] < 1280 and image.std() > 0.05


def test_plot_draws_a_run(runs, tmp_path):
    command = [
        sys.executable,
        ROOT / "records/plot.py",
        runs[1].with_name("scores1337.csv"),
        runs[1],
        "--out",
        tmp_path,
    ]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert_pictures(tmp_path, "ladder.png", "position.png", "training.png")


@pytest.mark.parametrize("conditions", [("flat",), ("ttt", "new", "doc")])
def test_plot_draws_any_conditions_of_a_short_run(tmp_path, conditions):
    log = write_run(tmp_path, conditions=conditions, MAX_VAL_DOCS="6")
    assert run_log.read_log(log).partial
    assert (
        plot.main([str(tmp_path / "scores1337.csv"), str(log), "--out", str(tmp_path / "out")]) == 0
    )
    assert_pictures(tmp_path / "out", "ladder.png", "position.png", "training.png")


def test_plot_draws_an_evaluation_without_training(tmp_path):
    log = write_run(tmp_path, EVAL_ONLY="1", MODEL_PATH="final_model.int8.ptz")
    edit(log, r"^(step:|stopping|Serialized|Code|Total|submission).*\n", "")
    assert (
        plot.main([str(tmp_path / "scores1337.csv"), str(log), "--out", str(tmp_path / "out")]) == 0
    )
    assert_pictures(tmp_path / "out", "ladder.png", "position.png")


OTHER_SCORES = {
    "tokens": (r"^doc,0,0,0,90,", "doc,0,0,0,91,", "condition:doc tokens:16091"),
    "bytes": (r"^ttt,0,0,0,90,225,", "ttt,0,0,0,90,226,", "condition:ttt"),
    "nats": (
        r"^(stride,0,0,0,90,225,2\d\d)\..*",
        r"\g<1>.999",
        "condition:stride",
    ),  # 1e-5 or so for each token
    "condition": (r"^ttt,.*\n", "", "conditions ['flat', 'doc', 'stride']"),
    "header": (r"^condition,", "what,", "the header 'what,doc"),
    "number": (r"^doc,0,0,0,90,", "doc,0,0,0,many,", "many"),
}


@pytest.mark.parametrize("case", OTHER_SCORES)
def test_plot_refuses_the_scores_of_another_run(runs, tmp_path, capsys, case):
    pattern, new, message = OTHER_SCORES[case]
    text, count = re.subn(
        pattern, new, runs[1].with_name("scores1337.csv").read_text(), flags=re.MULTILINE
    )
    assert count
    (tmp_path / "scores.csv").write_text(text)
    assert (
        plot.main([str(tmp_path / "scores.csv"), str(runs[1]), "--out", str(tmp_path / "out")]) == 1
    )
    err = capsys.readouterr().err
    assert (
        err.startswith(f"error: {tmp_path / 'scores.csv'}: found ")
        and err.count("\n") == 1
        and message in err
    )
    assert not (tmp_path / "out").exists()


def test_plot_names_a_file_that_is_missing(runs, tmp_path, capsys):
    assert plot.main([str(tmp_path / "no.csv"), str(runs[0]), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no.csv'}: No such file")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError):
        plot.write_pictures({"b.png": b"x"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def score_rows(*rows):
    return np.array([("doc", *row) for row in rows], dtype=plot.COLUMNS)


def test_positions_divide_sums_by_sums():
    """Two pieces of different density at one place, a shorter one behind them, and bins without text."""
    rows = score_rows(
        (0, 0, 0, 100, 200, 80.0), (1, 0, 0, 100, 400, 100.0), (1, 1, 100, 50, 100, 30.0)
    )
    position, bits = plot.bits_by_position(rows, np.array([0, 50, 100, 200]))
    assert bits == pytest.approx([180 / 600 / math.log(2), 30 / 100 / math.log(2)])
    assert position == pytest.approx([50, 125])
    weighted, _ = plot.bits_by_position(rows, np.array([0]))
    assert weighted == pytest.approx([(600 * 50 + 100 * 125) / 700])


def test_bins_of_positions_hold_enough_text_and_lose_none(runs):
    rows = plot.read_scores(runs[1].with_name("scores1337.csv"), run_log.read_log(runs[1]))
    rows = rows[rows["doc"] >= 0]
    edges = plot.position_edges(rows)
    held = [
        rows["bytes"][(rows["start"] >= a) & (rows["start"] < b)].sum()
        for a, b in pairwise([*edges, 10**9])
    ]
    assert (
        sum(held) == rows["bytes"].sum()
        and min(held) >= plot.LEAST_SHARE * sum(held)
        and len(held) > 8
    )
    bits = plot.bits_by_position(rows, edges)[1]
    assert np.dot(bits, held) * math.log(2) == pytest.approx(rows["loss_nats"].sum())


def test_too_little_text_at_the_end_joins_the_bin_before():
    rows = score_rows((0, 0, 0, 100, 500, 1.0), (0, 1, 100, 100, 480, 1.0), (0, 2, 200, 4, 20, 1.0))
    assert plot.position_edges(rows).tolist() == [0, 100]


def test_text_before_the_first_document_has_no_position(runs):
    log = run_log.read_log(runs[1])
    rows = plot.read_scores(runs[1].with_name("scores1337.csv"), log)
    lines = plot.position_figure(rows, log).axes[0].lines
    inside = rows[rows["doc"] >= 0]
    for line, condition in zip(lines, LADDER, strict=True):
        expected = plot.bits_by_position(
            inside[inside["condition"] == condition], plot.position_edges(inside)
        )
        assert np.array_equal(line.get_xydata(), np.transpose(expected))


def test_a_running_mean_looks_no_further_than_half_way_to_the_start():
    steps, losses = np.array([1.0, 2, 3, 4, 100]), np.array([8.0, 6, 4, 2, 1])
    assert plot.running_mean(steps, losses, 1000) == pytest.approx(
        [8, 6, 4, 4, 1]
    )  # the fourth sees steps 2 to 6
    assert plot.running_mean(steps, losses, 10) == pytest.approx([8, 6, 4, 3, 1])  # and here 3 to 5


# --- Records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in ROOT.glob("records/*/*/*")}), ids=str
)
def test_every_record_agrees_with_its_logs(folder):
    make_record.verify(folder)


def test_a_record_holds_what_checks_its_number(runs, record):
    assert (record.parent.name, record.name) == ("track_cpu", "2026-11-22_try-1")
    assert not list(record.parent.parent.glob(".*"))
    make_record.verify(record)
    assert (record / "train_gpt.py").read_bytes() == (ROOT / "train_gpt.py").read_bytes()
    for seed, path in zip((1338, 1337, 1339), runs, strict=True):
        assert (record / f"seed{seed}.txt").read_bytes() == path.read_bytes()
    logs = [run_log.read_log(path) for path in sorted(runs)]
    bpb, loss = (
        [float(getattr(log.ladder[-1], name)) for log in logs] for name in ("val_bpb", "val_loss")
    )
    facts = json.loads((record / "submission.json").read_text())
    assert (facts["name"], facts["date"], facts["track"]) == ("try-1", "2026-11-22", "track_cpu")
    assert facts["val_bpb"] == round(sum(bpb) / 3, 6) and facts["val_loss"] == round(
        sum(loss) / 3, 6
    )
    assert [(seed["seed"], seed["steps"], seed["val_bpb"]) for seed in facts["seeds"]] == [
        (1337, 1207, bpb[0]),
        (1338, 1208, bpb[1]),
        (1339, 1209, bpb[2]),
    ]
    assert facts["statistics"]["p_value"] == pytest.approx(
        stats.summarize(bpb, 1.6).p_value, rel=1e-5
    )
    assert (
        facts["bytes_model"] == 1441734 + 1339
        and facts["bytes_total"] == facts["bytes_model"] + facts["bytes_code"]
    )
    readme = (record / "README.md").read_text()
    for text in (
        *(log.command for log in logs),
        f"**{sum(bpb) / 3:.4f}**",
        "| 1.1910 | -0.0368 |",
        "demo corpus on a CPU",
    ):
        assert text in readme


def test_pictures_of_a_record(record, tmp_path):
    for path in record.glob("*.png"):
        shutil.copy(path, tmp_path)
    assert_pictures(tmp_path, "ladder.png", "position.png", "training.png")


@pytest.mark.parametrize("change", ["missing", "edited"])
def test_a_record_without_its_scores_file_shows_no_positions(tmp_path, change):
    runs = [write_run(tmp_path / "runs", seed) for seed in (10, 9)]
    scores = tmp_path / "runs" / "scores9.csv"
    scores.unlink() if change == "missing" else scores.write_text("condition\n")
    folder = make_record.make_record("x", 1.6, runs, tmp_path)
    assert (
        not (folder / "position.png").exists()
        and "position" not in (folder / "README.md").read_text()
    )
    make_record.verify(folder)


TAMPERED = {
    "log": ("seed1338.txt", r"train_loss:(\d)\.", r"train_loss:1\1."),
    "ladder": (
        "seed1338.txt",
        r"^ladder condition:ttt val_loss:\d",
        "ladder condition:ttt val_loss:1",
    ),
    "readme": ("README.md", r"\*\*1\.", "**0."),
    "submission": ("submission.json", r'"val_bpb": 1', '"val_bpb": 0'),
    "threshold": ("submission.json", r'"threshold": 1\.6', '"threshold": 1.7'),
    "name": ("submission.json", "try-1", "try-2"),
    "script": ("train_gpt.py", "import math", "import cmath"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_record_that_was_tampered_with_is_refused(record, tmp_path, case):
    folder = shutil.copytree(record, tmp_path / record.parent.name / record.name)
    make_record.verify(folder)
    name, pattern, new = TAMPERED[case]
    text, count = re.subn(pattern, new, (folder / name).read_text(), count=1, flags=re.MULTILINE)
    assert count
    (folder / name).write_text(text)
    assert str(folder) in refusal(make_record.verify, folder)


def test_a_record_with_files_too_many_or_too_few_is_refused(record, tmp_path):
    for number, change in enumerate(
        (
            lambda folder: (folder / "ladder.png").unlink(),
            lambda folder: (folder / "notes.md").write_text("x"),
            lambda folder: (folder / "other.png").write_text("x"),
            lambda folder: (folder / "seed1339.txt").unlink(),
            lambda folder: (folder / "seed1339.txt").rename(folder / "seed9.txt"),
        )
    ):
        folder = shutil.copytree(record, tmp_path / str(number) / record.parent.name / record.name)
        change(folder)
        refusal(make_record.verify, folder)


def test_a_record_in_another_place_is_refused(record, tmp_path):
    folder = shutil.copytree(record, tmp_path / "track_10min_16mb" / record.name)
    assert "expected track_cpu/2026-11-22_try-1" in refusal(make_record.verify, folder)


H100 = dict(
    preset="baseline",
    device="cuda:0",
    world_size=8,
    hardware="8 x NVIDIA H100 80GB HBM3, CUDA 12.8",
)
TRACK = {
    "demo": ({}, {}, "track_cpu"),
    "demo, elsewhere": ({}, {"DATA_PATH": "/mnt/data/demo/"}, "track_cpu"),
    "other data": ({}, {"DATA_PATH": "/mnt/mydata/demo"}, "track_non_record_16mb"),
    "demo on a GPU": ({"device": "cuda:0"}, {}, "track_non_record_16mb"),
    "other preset": ({"preset": "baseline"}, {}, "track_non_record_16mb"),
    "record": (H100, {"MAX_WALLCLOCK_SECONDS": "600.0"}, "track_10min_16mb"),
    "too long": (H100, {"MAX_WALLCLOCK_SECONDS": "601.0"}, "track_non_record_16mb"),
    "no cap": (H100, {"MAX_WALLCLOCK_SECONDS": "0.0"}, "track_non_record_16mb"),
    "one rank": (H100 | {"world_size": 1}, {}, "track_non_record_16mb"),
    "ranks of a CPU": (H100 | {"device": "cpu"}, {}, "track_non_record_16mb"),
    "small model": (H100 | {"preset": "cpu"}, {}, "track_non_record_16mb"),
    "A100": (
        H100 | {"hardware": "8 x NVIDIA A100-SXM4-80GB, CUDA 12.8"},
        {},
        "track_non_record_16mb",
    ),
    "few H100": (
        H100 | {"hardware": "4 x NVIDIA H100 80GB HBM3, CUDA 12.8"},
        {},
        "track_non_record_16mb",
    ),
}


@pytest.mark.parametrize("case", TRACK)
def test_the_track_follows_from_the_log(runs, case):
    place, settings, track = TRACK[case]
    log = run_log.read_log(runs[0])
    assert make_record.track_of(replace(log, config={**log.config, **settings}, **place)) == track


def test_the_date_is_that_of_the_last_start(tmp_path):
    paths = [write_run(tmp_path, seed) for seed in (1, 2)]
    edit(paths[0], "^started:2026-11-22", "started:2026-11-23")
    assert make_record.date_of([run_log.read_log(path) for path in paths]) == "2026-11-23"


NO_RECORD = {
    "partial": (dict(MAX_VAL_DOCS="6"), None, "partial run"),
    "partial line": ({}, (r"^(final_int8_ttt_lora .*)$", r"\1 partial"), "partial run"),
    "partial, whitewashed": (dict(MAX_VAL_DOCS="6"), (r" partial$", ""), "partial run"),
    "weights": (dict(MODEL_PATH="first.pt"), None, "MODEL_PATH=first.pt"),
    "evaluation": (
        dict(EVAL_ONLY="1", MODEL_PATH="a.ptz"),
        (r"^step:.*\n", ""),
        "MODEL_PATH=a.ptz",
    ),
    "no training": (dict(EVAL_ONLY="1"), (r"^step:.*\n", ""), "nothing trained"),
    "causality": ({}, (r"^audit causality.*\n", ""), "for condition:ttt, the last of EVAL"),
    "causality elsewhere": (
        {},
        (r"^(audit causality: condition:)ttt", r"\1doc"),
        "for condition:ttt, the last",
    ),
    "final line": ({}, (r"^final_int8_ttt_lora .*\n", ""), "final_int8_ttt_lora"),
    "tokenizer": ({}, (r"^(sha256 tokenizer:)a", r"\1b"), "found tokenizer "),
    "validation": ({}, (r"^(sha256 val:)b", r"\1a"), "found validation shards "),
    "another shard": (
        {},
        (r"^(sha256 val:.*0)0\.bin", r"\g<0>\n\g<1>1.bin"),
        "found validation shards ",
    ),
    "setting": (
        dict(MAX_WALLCLOCK_SECONDS="170.0"),
        None,
        "found MAX_WALLCLOCK_SECONDS 170.0; expected 175.0",
    ),
    "setting too many": (dict(NEW="1"), None, "found NEW 1; expected None"),
    "ranks": ({}, (r"(world_size:|nproc_per_node=)2", r"\g<1>1"), "found world_size 1; expected 2"),
    "dtype": ({}, (r"dtype:torch.bfloat16", "dtype:torch.float32"), "found dtype torch.float32"),
    "device": (
        dict(DEVICE="cuda"),
        (r"device:cpu", "device:cuda:0"),
        "found DEVICE cuda; expected cpu",
    ),
    "track": (
        dict(DATA_PATH="/mnt/shards"),
        None,
        "found track track_non_record_16mb; expected track_cpu",
    ),
    "versions": ({}, (r"numpy:2.4.6", "numpy:2.4.5"), "found versions "),
    "seed": ({}, (r" SEED=1339", " SEED=1337"), "found SEED=1337 in 2 logs"),
}


def refused_record(capsys, monkeypatch, records, *arguments):
    """The line with which the command refuses to make a record; nothing is written."""
    records.mkdir(exist_ok=True)
    monkeypatch.setattr(make_record, "RECORDS", records)
    before = sorted(records.rglob("*"))
    assert make_record.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(records.rglob("*")) == before
    return err


@pytest.mark.parametrize("case", NO_RECORD)
def test_runs_that_are_no_record_are_refused(runs, tmp_path, capsys, monkeypatch, case):
    settings, change, message = NO_RECORD[case]
    odd = write_run(tmp_path, 1339, **settings)
    if change:
        edit(odd, *change)
    arguments = ["--name", "x", "--threshold", "1.6", "--logs", *runs[:2], odd]
    assert message in refused_record(capsys, monkeypatch, tmp_path / "records", *arguments)


def test_sources_and_machines_that_differ_are_refused(runs, tmp_path, capsys, monkeypatch):
    arguments = ["--name", "x", "--threshold", "1.6", "--logs", *runs[:2], tmp_path / "run1339.txt"]
    text = write_run(tmp_path, 1339).read_text()
    other = SOURCE.replace("rms_norm", "rms_nomr")  # of the same length
    text = text.replace(SOURCE, other).replace(digest(SOURCE.encode()), digest(other.encode()))
    (tmp_path / "run1339.txt").write_text(text)
    assert "found script " in refused_record(capsys, monkeypatch, tmp_path / "records", *arguments)
    text = write_run(tmp_path, 1339).read_text().replace("AMD EPYC", "Intel Xeon")
    (tmp_path / "run1339.txt").write_text(text)
    assert "found hardware Intel Xeon" in refused_record(
        capsys, monkeypatch, tmp_path / "records", *arguments
    )


def test_an_artifact_over_the_budget_is_drawn_but_no_record(runs, tmp_path, capsys, monkeypatch):
    odd = write_run(tmp_path, 1339)
    code, model = len(SOURCE.encode()), 16_000_001 - len(SOURCE.encode())
    edit(odd, r"^(Serialized model int8\+zlib: )\d+", rf"\g<1>{model}")
    edit(odd, r"^(Total submission size int8\+zlib: )\d+", rf"\g<1>{model + code}")
    edit(odd, r"^submission_size:.*", "submission_size:16000001 budget:16000000 headroom:-1 FAIL")
    assert plot.draw([run_log.read_log(odd)], None).keys() == {"ladder.png", "training.png"}
    arguments = ["--name", "x", "--threshold", "1.6", "--logs", *runs[:2], odd]
    assert "found 16000001 bytes" in refused_record(
        capsys, monkeypatch, tmp_path / "records", *arguments
    )
    edit(
        odd, r"^submission_size:.*", "submission_size:16000001 budget:17000000 headroom:999999 PASS"
    )
    assert "of a budget of 17000000;" in refused_record(
        capsys, monkeypatch, tmp_path / "records", *arguments
    )
    small = write_run(tmp_path, 1339)
    edit(
        small,
        r"budget:16000000 headroom:(\d+)",
        lambda found: f"budget:16000001 headroom:{int(found[1]) + 1}",
    )
    assert "of a budget of 16000001;" in refused_record(
        capsys, monkeypatch, tmp_path / "records", *arguments
    )


def test_scores_of_other_text_are_refused(runs):
    logs = [run_log.read_log(path) for path in runs]
    flat, *others = logs[2].ladder
    logs[2] = replace(logs[2], ladder=(replace(flat, tokens=flat.tokens - 1), *others))
    assert "found (tokens, bytes) of condition:flat (15871, " in refusal(
        make_record.check_together, logs
    )


def test_the_same_shards_may_lie_elsewhere(runs, tmp_path):
    other = write_run(
        tmp_path, 5, DATA_PATH="/mnt/data/demo", TOKENIZER_PATH="/mnt/tokenizer.model"
    )
    make_record.verify(make_record.make_record("x", 1.6, [runs[0], other], tmp_path))


def ladder_rows(log, *ladders):
    """The lines of the ladder's table for runs with these scores, (condition, val_loss, val_bpb) each."""
    decimal = run_log.Decimal
    rungs = [
        [run_log.Rung(name, decimal(loss), decimal(bpb), 1, 1) for name, loss, bpb in one]
        for one in ladders
    ]
    return make_record.ladder_table([replace(log, ladder=tuple(one)) for one in rungs]).split("\n")


def test_the_ladder_in_a_readme(runs):
    log = run_log.read_log(runs[1])
    table = ladder_rows(
        log,
        [("flat", "2.7", "1.61"), ("ttt", "2.5", "1.54"), ("new", "2.4", "1.5")],
        [("flat", "2.8", "1.63"), ("ttt", "2.6", "1.56"), ("new", "2.4", "1.5")],
    )
    seeds = "seed 1337 | seed 1337"
    assert (
        table[0]
        == f"| condition | val_loss | val_bpb | delta | std | {seeds} | published | published delta |"
    )
    ttt = "| ttt (+ LoRA test-time training) | 2.5500 | **1.5500** | -0.0700 | 0.0100 | 1.5400 | 1.5600 "
    assert table[3] == ttt + "| 1.1910 | -0.0368 |"
    assert table[4] == "| new | 2.4000 | **1.5000** | -0.1200 | 0.0000 | 1.5000 | 1.5000 |  |  |"


def test_published_deltas_start_where_ours_do(runs):
    log, ttt = run_log.read_log(runs[1]), ("ttt", "2.5", "1.54")
    assert ladder_rows(log, [("doc", "2.7", "1.6"), ttt])[3].endswith("| 1.1910 | -0.0258 |")
    assert ladder_rows(log, [("new", "2.7", "1.6"), ttt])[3].endswith("| 1.1910 |  |")


@pytest.mark.parametrize(
    ("name", "threshold", "count", "message"),
    [
        ("a/b", "1.6", 3, "--name 'a/b'"),
        ("", "1.6", 3, "--name ''"),
        ("x\n", "1.6", 3, "--name 'x\\n'"),
        ("x", "nan", 3, "found nan"),
        ("x", "1.6", 1, "found 1 value"),
    ],
)
def test_wrong_arguments_are_refused(
    runs, tmp_path, capsys, monkeypatch, name, threshold, count, message
):
    arguments = ["--name", name, "--threshold", threshold, "--logs", *runs[:count]]
    assert message in refused_record(capsys, monkeypatch, tmp_path, *arguments)


def test_a_record_is_never_replaced(runs, record, capsys, monkeypatch):
    arguments = ["--name", "try-1", "--threshold", "1.6", "--logs", *runs]
    assert f"{record}: found an earlier record" in refused_record(
        capsys, monkeypatch, record.parent.parent, *arguments
    )


def test_a_log_that_is_missing_is_named(runs, tmp_path, capsys, monkeypatch):
    arguments = ["--name", "x", "--threshold", "1.6", "--logs", runs[0], tmp_path / "no.txt"]
    assert f"{tmp_path / 'no.txt'}: No such file" in refused_record(
        capsys, monkeypatch, tmp_path / "records", *arguments
    )


def test_the_command_prints_where_the_record_is(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(make_record, "RECORDS", tmp_path)
    assert make_record.main(["--name", "x", "--threshold", "1.6", "--logs", *map(str, runs)]) == 0
    assert capsys.readouterr().out == f"record:{tmp_path / 'track_cpu' / '2026-11-22_x'}\n"


# --- The program's own logs ------------------------------------------------------------------------------------------


def test_real_runs_become_a_record(tmp_path):
    """Two tiny trainings, and what the tools make of what they wrote."""
    (data := tmp_path / "data").mkdir()
    (data / "fineweb_train_000000.bin").symlink_to(CONFORMANCE / "fineweb_train_000000.bin")
    write_shard(
        data / "fineweb_val_000000.bin",
        tg.open_shard(CONFORMANCE / "fineweb_val_000000.bin")[:4000],
    )
    paths = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        out.mkdir()
        settings = dict(
            MAX_VAL_DOCS=None, SEED=seed, EVAL="flat,doc,stride,ttt", SCORES_PATH="scores.csv"
        )
        done = run_script(out, ITERATIONS="3", DATA_PATH=str(data), **settings)
        assert not done.returncode, done.stderr
        paths.append(out / "logs" / "test.txt")
    logs = [run_log.read_log(path) for path in paths]
    assert [log.seed for log in logs] == [1, 2] and logs[0].score.condition in logs[0].causal
    rows = plot.read_scores(tmp_path / "1" / "scores.csv", logs[0])
    assert not (rows["start"] % 64).any() and rows["tokens"].max() == 64
    pictures = plot.draw(logs[:1], rows)
    assert pictures.keys() == {"ladder.png", "position.png", "training.png"}
    folder = make_record.make_record("tiny", 5.0, paths, tmp_path)
    make_record.verify(folder)
    assert folder.parent.name == "track_non_record_16mb" and (folder / "position.png").exists()


def test_a_real_short_run_is_read(tmp_path):
    """The lines end in ` partial`, some documents are left out, and nothing was trained."""
    done = run_script(tmp_path, EVAL="ttt,flat", SCORES_PATH="scores.csv", **EVAL_ARTIFACT)
    assert not done.returncode, done.stderr
    log = run_log.read_log(tmp_path / "logs" / "test.txt")
    assert log.partial and not log.validation and log.sizes is None
    plot.draw([log], plot.read_scores(tmp_path / "scores.csv", log))
