"""Four ideas that people try, as patches to a copy of the script: each touches one band and nothing else breaks.

A patch is a list of (old, new). Every `old` occurs once, and all lie in one band, but for the line of `Config` that
gives an idea its setting. The fork trains, packs and is scored from its artifact under flat, ttt and stream, with all
audits. README.md shows the first one.
"""

import json
import re

import pytest
from conftest import ROOT, run_script

SETTING = "    tie_embeddings: bool = architectural("

FORKS = {
    "activation": [
        (
            "        x = F.relu(self.fc(x, lora.fc)).square()\n",
            "        x = F.gelu(self.fc(x, lora.fc))\n",
        ),
    ],
    "loop": [
        (
            SETTING,
            '    loop_count: int = architectural(2, "passes through the middle blocks", 1, 8)\n'
            + SETTING,
        ),
        (
            "            x = block(x, x0, rope, adapters.blocks[layer], cache)\n",
            "            is_middle = 0 < layer < len(self.blocks) - 1\n"
            "            for _ in range(self.cfg.loop_count if is_middle else 1):\n"
            "                x = block(x, x0, rope, adapters.blocks[layer], cache)\n",
        ),
    ],
    "gate": [
        (
            "        self.q_gain = parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))\n",
            "        self.q_gain = parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))\n"
            "        self.gate = parameter(torch.zeros(cfg.num_heads))\n",
        ),
        (
            "        y = y.transpose(1, 2).reshape(x.shape)\n",
            "        y = y * (2 * self.gate.sigmoid()).to(y.dtype)[:, None, None]\n"
            "        y = y.transpose(1, 2).reshape(x.shape)\n",
        ),
    ],
    "partial_rope": [
        (
            SETTING,
            '    rope_share: float = architectural(0.5, "share of a head that is rotated", 0, 1)\n'
            + SETTING,
        ),
        (
            "        q = rotate(rms_norm(q.float()), *rope) * self.q_gain[:, None, None]\n"
            "        k = rotate(rms_norm(k.float()), *rope)\n",
            "        q = rotate_part(rms_norm(q.float()), *rope) * self.q_gain[:, None, None]\n"
            "        k = rotate_part(rms_norm(k.float()), *rope)\n",
        ),
        (
            "        evens = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=positions.device)\n"
            "        frequency = self.cfg.rope_base ** -(evens / self.head_dim)\n",
            "        dim = 2 * round(self.head_dim * self.cfg.rope_share / 2)\n"
            "        evens = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)\n"
            "        frequency = self.cfg.rope_base ** -(evens / dim)\n",
        ),
        (
            "class Attention(nn.Module):\n",
            "def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:\n"
            "    rotated, rest = x.split((2 * cos.size(-1), x.size(-1) - 2 * cos.size(-1)), dim=-1)\n"
            "    return torch.cat((rotate(rotated, cos, sin), rest), dim=-1)\n\n\n"
            "class Attention(nn.Module):\n",
        ),
    ],
}


def bands_of(source, old):
    """The band that holds `old`."""
    heads = re.findall(r"^# ==== (.*?) =+$", source[: source.index(old)], re.M)
    return heads[-1]


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_touches_one_band(name):
    source = (ROOT / "train_gpt.py").read_text()
    for old, _ in FORKS[name]:
        assert source.count(old) == 1, old
    bands = {bands_of(source, old) for old, _ in FORKS[name] if old != SETTING}
    assert bands == {"Model"}
    assert bands_of(source, SETTING) == "Config"


def results(done):
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in re.findall(r"^result: (.*)$", done.stdout, re.M)]
    return {line["condition"]: line["val_bpb"] for line in lines}


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_trains_packs_and_is_scored(name, tmp_path):
    source = (ROOT / "train_gpt.py").read_text()
    for old, new in FORKS[name]:
        source = source.replace(old, new)
    script = tmp_path / "fork.py"
    script.write_text(source)
    conditions = "flat,ttt,stream"
    settings = {"MAX_VAL_DOCS": "3", "NUM_LAYERS": "4", "EVAL": conditions, "WARMDOWN_ITERS": "0"}
    # A budget that makes the artifact int8, so that the quantiser meets the fork, too.
    budget = str(len(source.encode()) + 90_000)
    trained = run_script(
        tmp_path, script=script, ITERATIONS="10", ARTIFACT_BUDGET=budget, **settings
    )
    scores = results(trained)
    assert list(scores) == conditions.split(",")
    assert re.search(r"payload_ratio:[23]\.", trained.stdout)  # int8
    losses = [float(loss) for loss in re.findall(r"train_loss:([\d.]+)", trained.stdout)]
    assert losses[-1] < losses[0] - 0.3
    settings |= {"EVAL_ONLY": "1", "MODEL_PATH": str(tmp_path / "final_model.int8.ptz")}
    again = run_script(tmp_path, script=script, RUN_ID="again", ARTIFACT_BUDGET=budget, **settings)
    assert results(again) == scores
    for condition in ("ttt", "stream"):
        assert re.search(rf"audit causality: condition:{condition} .*PASS", again.stdout)
    # The idea does something: the script as it is scores these weights otherwise, or refuses them.
    plain = run_script(tmp_path, RUN_ID="plain", ARTIFACT_BUDGET=budget, **settings)
    assert plain.returncode != 0 or results(plain)["flat"] != scores["flat"]
