"""Shards, the training stream and the validation documents."""

import numpy as np
import pytest
import torch
from conftest import CPU, EVAL_ARTIFACT, TINY_RUN, tiny_config, tiny_table, write_shard

import train_gpt as tg


def test_shard_round_trip(tmp_path):
    path = write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5, 65535])
    assert tg.open_shard(path).tolist() == [1, 5, 65535]


def header(*numbers):
    return np.array([*numbers, *[0] * (256 - len(numbers))], dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0 bytes"),
        (b"\0" * 1023, "found 1023 bytes"),
        (header(7, 1, 2) + b"\0" * 4, "magic 7"),
        (header(20240520, 2, 2) + b"\0" * 4, "version 2"),
        (header(20240520, 1, 0), "0 tokens"),
        (header(20240520, 1, -3), "-3 tokens"),
        (header(20240520, 1, 2**31 - 1) + b"\0" * 4, "2147483647 tokens"),
        (header(20240520, 1, 1) + b"\0" * 4, "1028 bytes"),
        (b"tokens\n" * 1000, "found 7000 bytes"),
        (header(20240520, 1, 3) + b"\0" * 4, "1028 bytes"),
        (header(20240520, 1, 2) + b"\0" * 5, "1029 bytes"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, content, found):
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(tg.UserError) as refused:
        tg.open_shard(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: found ")
    assert found in line
    assert "expected magic" in line


def test_every_header_is_checked_at_once(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 2, 3])
    (tmp_path / "fineweb_train_000001.bin").mkdir()
    with pytest.raises(tg.UserError, match="fineweb_train_000001"):
        tg.open_shards(str(tmp_path), "train")


def test_missing_shards_are_refused(tmp_path):
    with pytest.raises(tg.UserError, match=r"found no fineweb_val_\*.bin"):
        tg.open_shards(str(tmp_path), "val")


def test_stream_reads_shards_in_order_and_wraps(tmp_path):
    parts = [np.arange(4, 11), np.arange(11, 14), np.arange(14, 34)]
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", part)
    stream = tg.TokenStream(tg.open_shards(str(tmp_path), "train"))
    everything = np.tile(np.arange(4, 34), 4)
    for start in range(45):
        for count in (1, 3, 10, 64):
            assert stream.read(start, count).tolist() == everything[start : start + count].tolist()


def micro_steps(world, rank, cfg, tokens, steps):
    """The batches that rank `rank` of `world` sees in `steps` optimizer steps."""
    stream = tg.TokenStream([tokens])
    rt = tg.Runtime(CPU, torch.float32, rank=rank, world=world)
    return [stream.next_batch(cfg, rt) for _ in range(steps * cfg.grad_accum_steps)]


def test_micro_step_follows_the_published_layout():
    """(local + 1) * world tokens a micro-step, rank r takes span r, targets are inputs shifted by one."""
    tokens = (np.arange(1000) % 90 + 4).astype(np.uint16)
    cfg = tiny_config(train_batch_tokens=256, train_seq_len=32, grad_accum_steps=2)
    for rank in (0, 1):
        for micro, (x, y) in enumerate(micro_steps(2, rank, cfg, tokens, 3)):
            span = tokens[(2 * micro + rank) * 65 : (2 * micro + rank + 1) * 65].astype(int)
            assert x.tolist() == span[:-1].reshape(2, 32).tolist()
            assert y.tolist() == span[1:].reshape(2, 32).tolist()


def test_order_of_tokens_does_not_depend_on_world_size():
    tokens = (np.arange(5000) % 90 + 4).astype(np.uint16)

    def order(world):
        cfg = tiny_config(train_batch_tokens=512, train_seq_len=32, grad_accum_steps=8 // world)
        ranks = [micro_steps(world, rank, cfg, tokens, 2) for rank in range(world)]
        return [batch[0].tolist() for together in zip(*ranks, strict=True) for batch in together]

    assert order(1) == order(2) == order(4) == order(8)


def test_documents_reach_to_the_next_bos():
    docs = tg.split_documents(np.array([1, 5, 6, 1, 1, 7, 1, 8, 9]), 1, 0, tiny_table(96), CPU)
    assert docs.starts.tolist() == [0, 3, 4, 6]
    assert docs.predictions.tolist() == [3, 1, 2, 2]
    assert docs.beyond_limit == 0


def test_what_is_left_out_is_counted():
    docs = tg.split_documents(np.array([5, 6, 7, 1, 8, 1]), 1, 0, tiny_table(96), CPU)
    assert (docs.starts.tolist(), docs.predictions.tolist()) == ([3], [2])
    assert docs.beyond_limit == 0


def test_limit_keeps_the_closing_bos():
    stream = np.array([1, 5, 6, 1, 7, 8, 9, 1, 10])
    docs, whole, beyond = (
        tg.split_documents(stream, 1, limit, tiny_table(96), CPU) for limit in (2, 0, 9)
    )
    assert docs.beyond_limit == 1
    assert (docs.starts.tolist(), docs.predictions.tolist(), len(docs.tokens)) == (
        [0, 3],
        [3, 4],
        8,
    )
    assert whole.predictions.tolist() == beyond.predictions.tolist() == [3, 4, 1]


@pytest.mark.parametrize("stream", [[5, 6, 7], [1], [5, 1]])
def test_nothing_to_predict_is_refused(stream):
    with pytest.raises(tg.UserError, match="nothing to predict"):
        tg.split_documents(np.array(stream), 1, 0, tiny_table(96), CPU)


def load(rt, tmp_path, val, train=(1, 5, 6), **env):
    write_shard(tmp_path / "fineweb_val_000000.bin", val)
    write_shard(tmp_path / "fineweb_train_000000.bin", [1, 5, 6] * 50)
    write_shard(tmp_path / "fineweb_train_000001.bin", train)
    env = TINY_RUN | {"DATA_PATH": str(tmp_path)} | env
    return tg.load_inputs(tg.read_config(env), rt, tg.RunLog())


def test_validation_ids_are_checked_to_the_last_token(rt, tmp_path):
    with pytest.raises(tg.UserError, match="token id 1024, expected at most 1023"):
        load(rt, tmp_path, [1, 5] * 500 + [1024])


def test_training_ids_are_checked_to_the_last_shard(rt, tmp_path):
    inputs = load(rt, tmp_path, [1, 5] * 500, train=[1, 1023])
    assert inputs.stream.read(150, 2).tolist() == [1, 1023]
    with pytest.raises(tg.UserError, match="token id 1024, expected at most 1023"):
        load(rt, tmp_path, [1, 5] * 500, train=[1, 1024])


def test_eval_only_needs_no_training_shards(rt, tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5] * 150)
    env = TINY_RUN | EVAL_ARTIFACT | {"MAX_VAL_DOCS": "0", "DATA_PATH": str(tmp_path)}
    assert tg.load_inputs(tg.read_config(env), rt, tg.RunLog()).stream.shards == []
    with pytest.raises(tg.UserError, match="found no fineweb_train"):
        tg.load_inputs(tg.read_config(env | {"EVAL_ONLY": "0"}), rt, tg.RunLog())
