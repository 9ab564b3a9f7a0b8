"""Training: a golden trajectory, warm-up without a trace, the clock, and compile failures that do not stop a run."""

import copy
import json
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from conftest import CONFORMANCE, CPU, run_script, tiny_config, tiny_model, tiny_score, write_shard

import train_gpt as tg

GOLDEN = json.loads((CONFORMANCE.parent / "golden" / "ten_steps.json").read_text())


def make_trainer(cfg, rt, tokens=None, seed=0):
    torch.manual_seed(seed)
    tokens = torch.randint(4, 96, (5000,)).numpy().astype("uint16") if tokens is None else tokens
    model = tiny_model(cfg, rt)
    return tg.Trainer(model, tg.TokenStream([tokens]), cfg, rt, {})


def test_ten_golden_steps(rt):
    """The losses that this code printed when it agreed with the published one; a refactor must reproduce them."""
    env = {name: str(value) for name, value in GOLDEN["env"].items()}
    cfg = tg.read_config(
        env | {"PRESET": "baseline", "DEVICE": "cpu", "DATA_PATH": str(CONFORMANCE)}
    )
    model = tg.load_model(CONFORMANCE / "init.pt", replace(cfg, dtype="float32"))
    stream = tg.TokenStream(tg.open_shards(str(CONFORMANCE), "train"))
    trainer = tg.Trainer(model, stream, rt, tg.RunLog(), {})
    losses = [trainer.train_step().item() for _ in range(10)]
    assert losses == pytest.approx(GOLDEN["train_loss"], abs=GOLDEN["tolerance"])


def test_the_deepest_model_can_be_resumed(rt, tmp_path):
    """The reader, which refuses long lists of tensors, takes that of the most layers; none may have more."""
    with pytest.raises(tg.UserError, match="NUM_LAYERS='301'"):
        tg.read_config({"NUM_LAYERS": "301"})
    shape = dict(model_dim=8, num_heads=2, num_kv_heads=1, vocab_size=16, tie_embeddings=False)
    cfg = tiny_config(num_layers=301, out_dir=str(tmp_path), resume="auto", **shape)
    state = tg.GPT(cfg, rt.dtype).state_dict()
    with pytest.raises(tg.UserError, match="301 layers"):
        tg.shape_from_weights(state, cfg, "deep.pt")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.300.")}
    cfg = tg.shape_from_weights(state, cfg, "deep.pt")
    (tmp_path / "checkpoints").mkdir()
    rt.run_id, trainer = "deep", make_trainer(cfg, rt)
    trainer.step = 7
    trainer.save()
    trainer.step = 0
    trainer.resume()
    assert trainer.step == 7


def test_warm_up_leaves_no_trace(rt):
    cfg = tiny_config(warmup_steps=0)
    plain, warmed = make_trainer(cfg, rt), make_trainer(tiny_config(warmup_steps=3), rt)
    for trainer in (plain, warmed):
        trainer.warm_up()
    assert (warmed.step, warmed.stream.position) == (0, 0)
    assert [plain.train_step().item() for _ in range(3)] == [
        warmed.train_step().item() for _ in range(3)
    ]
    after = [trainer.model.state_dict() for trainer in (plain, warmed)]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_accumulation_averages_over_the_whole_batch(rt):
    """Gradient and loss of a step are those of the mean over all its tokens, however it is cut into micro-steps."""
    cfg = tiny_config(
        train_batch_tokens=256,
        train_seq_len=32,
        grad_accum_steps=4,
        matrix_lr=0.0,
        scalar_lr=0.0,
        tied_embed_lr=0.0,
    )
    trainer = make_trainer(cfg, rt)
    spans = [trainer.stream.read(i * 65, 65) for i in range(4)]
    seen = {}
    named = dict(trainer.model.named_parameters())
    trainer.model.zero_grad = lambda set_to_none: seen.update(
        {name: p.grad.clone() for name, p in named.items()}
    )
    loss = trainer.train_step()
    torch.nn.Module.zero_grad(trainer.model)
    x = torch.stack([torch.from_numpy(s[:-1]).view(2, 32) for s in spans]).view(8, 32)
    y = torch.stack([torch.from_numpy(s[1:]).view(2, 32) for s in spans]).view(8, 32)
    mean = trainer.model(x, y).mean()
    mean.backward()
    assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
    for name, p in named.items():
        tolerance = 1e-2 if p.dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(seen[name], p.grad, atol=tolerance, rtol=tolerance)


def test_a_fault_that_one_rank_knows_of_is_named_on_all(rt, monkeypatch):
    """A matrix's mean gradient is with its owner alone: what the other ranks have seen comes later in the order."""
    trainer = make_trainer(tiny_config(), rt)
    trainer.refuse_faults()
    owner = 2 * 2 * len(trainer.params)  # what it found: in step 3, the first gradient
    monkeypatch.setattr(rt, "gather", lambda value: [value, owner])
    with pytest.raises(tg.AgreedError, match="step 3: the gradient of skip_weights is not finite"):
        trainer.refuse_faults()


def test_gradients_are_clipped_by_their_global_norm(rt, monkeypatch):
    trainer = make_trainer(tiny_config(grad_clip_norm=1e-3), rt)
    norms = []

    def look(*args):
        grads = [p.grad.float().norm() for p in trainer.model.parameters()]
        norms.append(torch.stack(grads).norm().item())

    monkeypatch.setattr(trainer.optimizers[0], "step", look)
    trainer.train_step()
    assert norms == [pytest.approx(1e-3, rel=1e-2)]


def test_rates_follow_the_schedule(rt):
    cfg = tiny_config(iterations=10, warmdown_iters=4, muon_momentum_warmup_steps=4)
    trainer = make_trainer(cfg, rt)
    seen = []
    for _ in range(10):
        trainer.train_step()
        muon, adam = trainer.optimizers
        seen.append(
            (
                muon.param_groups[0]["lr"],
                adam.param_groups[0]["lr"],
                muon.param_groups[0]["momentum"],
            )
        )
    scales = [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [s[0] for s in seen] == pytest.approx([0.04 * s for s in scales])
    assert [s[1] for s in seen] == pytest.approx([0.05 * s for s in scales])
    assert [s[2] for s in seen][:6] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])


def share_on(rank, world, folder):
    """A rank of `test_shares_of_any_size`: five tensors, of any shape and dtype, one not rank 0's, none the last's."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    rt = tg.Runtime(CPU, torch.float32, rank, world)
    shares = [
        [torch.full((2, 3), rank + 1.0), torch.full((1,), 10.0 * rank)],
        [torch.full((4,), rank - 1.0)],
        [],
    ]
    shares[0] += [torch.full((7,), rank + 1.0, dtype=torch.bfloat16), torch.tensor(rank + 1.0)]
    rt.average(shares)
    averaged = copy.deepcopy(shares)
    rt.exchange(shares)
    torch.save((averaged, shares), folder / f"{rank}.pt")
    dist.destroy_process_group()
    time.sleep(0.1)


def test_shares_of_any_size(tmp_path):
    """Means reach the owner alone; then everybody has what each owner has. A rank may own nothing."""
    torch.multiprocessing.spawn(share_on, (3, tmp_path), nprocs=3)
    means = [[torch.full((2, 3), 2.0), torch.full((1,), 10.0)], [torch.zeros(4)], []]
    means[0] += [torch.full((7,), 2.0, dtype=torch.bfloat16), torch.tensor(2.0)]
    for rank in range(3):
        averaged, shared = torch.load(tmp_path / f"{rank}.pt")
        for owner in range(3):
            for tensor, mean, final in zip(
                averaged[owner], means[owner], shared[owner], strict=True
            ):
                assert torch.equal(tensor, mean) == (owner == rank or rank == 1) and torch.equal(
                    final, mean
                )
                assert (
                    (tensor.dtype, tensor.shape)
                    == (final.dtype, final.shape)
                    == (mean.dtype, mean.shape)
                )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What 1, 2 and 3 ranks hold after three clipped steps."""
    held = {}
    for world in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        settings = dict(
            GRAD_ACCUM_STEPS=str(6 // world), TRAIN_BATCH_TOKENS=str(6 * 64), TRAIN_SEQ_LEN="32"
        )
        settings |= dict(
            ITERATIONS="3",
            CHECKPOINT_EVERY="3",
            GRAD_CLIP_NORM="0.3",
            MUON_MOMENTUM_WARMUP_STEPS="0",
        )
        settings |= dict(
            DTYPE="float32", EVAL="flat", MAX_VAL_DOCS="1", WARMUP_STEPS="0", MODEL_DIM="32"
        )
        done = run_script(folder, ranks=world if world > 1 else 0, **settings)
        assert done.returncode == 0, done.stderr
        held[world] = tg.load_state(folder / "checkpoints" / "test.step000000003.pt")
    return held


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_trains_alike(checkpoints, world):
    """Weights, momentum of every matrix and Adam's moments: those of one rank, up to the order of sums."""
    alone, shared = checkpoints[1], checkpoints[world]
    assert (
        alone["identity"] == shared["identity"]
        and alone["tensors"].keys() == shared["tensors"].keys()
    )
    for name, tensor in alone["tensors"].items():
        assert name.endswith("skip_weights") or tensor.any() or "model." in name, name
        tolerance = (
            0.05 if tensor.dtype is torch.bfloat16 else 0.02
        )  # since the embedding and all updates are rounded
        difference = (tensor.float() - shared["tensors"][name].float()).abs().max()
        assert difference <= tolerance * tensor.float().abs().max(), name


class Clock:
    """Stands in for the time module: every reading is one second after the last."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1.0
        return self.now


def run_train(cfg, rt, monkeypatch, capsys, tmp_path):
    rt.log_path = tmp_path / "log.txt"
    monkeypatch.setattr(tg, "time", Clock())
    trainer = make_trainer(cfg, rt)
    tg.train(trainer, lambda: tiny_score(2.0, 1, 4))
    return trainer, capsys.readouterr().out.splitlines()


def test_log_lines_to_the_character(rt, monkeypatch, capsys, tmp_path):
    cfg = tiny_config(iterations=14, val_loss_every=7, train_log_every=6)
    _, lines = run_train(cfg, rt, monkeypatch, capsys, tmp_path)
    steps = [int(line.split("/")[0].removeprefix("step:")) for line in lines]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 12]
    assert (
        lines[0] == "step:0/14 val_loss:2.0000 val_bpb:0.7213 train_time:1000ms step_avg:1000.00ms"
    )
    assert lines[1].startswith("step:1/14 train_loss:") and lines[1].endswith(
        "train_time:2000ms step_avg:2000.00ms"
    )
    assert lines[8].startswith("step:7/14 val_loss:2.0000 val_bpb:0.7213 train_time:")


def test_wallclock_cap_stops_and_says_so(rt, monkeypatch, capsys, tmp_path):
    cfg = tiny_config(
        iterations=1000, max_wallclock_seconds=5.0, val_loss_every=0, train_log_every=0
    )
    trainer, lines = run_train(cfg, rt, monkeypatch, capsys, tmp_path)
    assert trainer.step == 5
    assert lines == ["stopping_early: wallclock_cap train_time:6000ms step:5/1000"]


def test_every_rank_follows_rank_0_s_clock(rt, monkeypatch):
    """Half of the warm-down is over by rank 0's clock, whatever this rank's own says."""
    trainer = make_trainer(tiny_config(max_wallclock_seconds=10.0, warmdown_iters=100), rt)
    monkeypatch.setattr(rt, "from_rank0", lambda value: 5000.0)
    trainer.train_step()
    trainer.tick(now=123.0)
    assert trainer.elapsed_ms == 5000.0
    trainer.train_step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.04 * 5000 / (100 * 5000))


def test_validation_is_outside_the_training_clock(rt, monkeypatch, capsys, tmp_path):
    rt.log_path = tmp_path / "log.txt"
    clock = Clock()
    monkeypatch.setattr(tg, "time", clock)
    trainer = make_trainer(tiny_config(iterations=3, val_loss_every=1), rt)

    def validate():
        clock.now += 1000.0
        return tiny_score(2.0, 1, 4)

    tg.train(trainer, validate)
    assert trainer.elapsed_ms < 20_000


def test_without_compiling_the_model_itself_runs(rt):
    model = tiny_model(tiny_config(), rt)
    assert tg.compile_forward(model, tiny_config(compile="auto"), rt) is model
    assert tg.compile_forward(model, tiny_config(compile="0"), rt) is model


def test_compiling_is_for_trainings_that_repay_it(rt, monkeypatch):
    """On a CPU: two minutes and 200 steps; COMPILE=0 and 1 are obeyed."""
    for seconds, steps, compile, wanted in (
        (0.0, 199, "auto", False),
        (0.0, 200, "auto", True),
        (119.0, 10**6, "auto", False),
        (120.0, 200, "auto", True),
        (600.0, 10**6, "0", False),
        (1.0, 1, "1", True),
    ):
        cfg = tiny_config(max_wallclock_seconds=seconds, iterations=steps, compile=compile)
        model, asked = tiny_model(cfg, rt), []
        monkeypatch.setattr(
            torch, "compile", lambda model, asked=asked, **options: asked.append(options) or model
        )
        tg.compile_forward(model, cfg, rt)
        assert bool(asked) == wanted


def test_training_lowers_the_loss(rt, tmp_path):
    """Real steps on a predictable stream."""
    shard = tg.open_shard(
        write_shard(tmp_path / "fineweb_train_000000.bin", [1, *[7, 8, 9, 10] * 2000])
    )
    trainer = make_trainer(
        tiny_config(iterations=40, warmdown_iters=0), tg.Runtime(CPU, torch.bfloat16), shard
    )
    losses = [trainer.train_step().item() for _ in range(40)]
    assert losses[-1] < 0.3 < losses[0]
