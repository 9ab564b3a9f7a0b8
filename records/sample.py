"""Write text with a model, before and after it learned from the prompt as `stream` learns.

    python records/sample.py out/demo/final_model.int8.ptz --prompt "The function returns"
    python records/sample.py final_model.int8.ptz --prompt "$(cat letter.txt)" --tokens 100 --seed 1

Both texts are drawn with the same random numbers, so a difference comes from the adapters: the
prompt is scored in chunks of TTT_STREAM_CHUNK tokens, and each chunk is learned from once it is
scored, as the program does with a document. Nothing is learned from the text that is written.
Settings are environment variables, as those of train_gpt.py; TOKENIZER_PATH must be the model's.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from run_log import run_command
from sentencepiece import SentencePieceProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_gpt as tg


def read_model(path: str, rt: tg.Runtime, cfg: tg.Config) -> tuple[tg.GPT, SentencePieceProcessor]:
    """Return the model, ready to evaluate, and its tokenizer. `UserError` if they do not fit."""
    model = tg.load_model(path, cfg)
    tokenizer = tg.load_tokenizer(cfg.tokenizer_path, model.cfg.vocab_size)
    found = tg.digest(Path(cfg.tokenizer_path).read_bytes())
    expected = model.made_with.get("tokenizer", found)
    tg.require(
        found == expected,
        f"TOKENIZER_PATH={cfg.tokenizer_path}: found SHA-256 {found}, expected {expected}, with"
        f" which {path} was made; give that one",
    )
    return tg.frozen(model.to(rt.device)), tokenizer


def read_prompt(
    model: tg.GPT, ids: Sequence[int], how: tg.Condition, rt: tg.Runtime, learns: bool
) -> tuple[tg.KVCache, tg.Adapters]:
    """Return what a prompt leaves behind: cached keys and values, and adapters if it `learns`.

    The last of the ids is not in the cache: it is the input that the first new token follows.
    """
    cache = tg.KVCache(1, how.window, how.chunk, rt)
    adapters = None
    if learns:
        adapters = tg.DocumentAdapters(model, how.learner, how.chunk, 1, rt)
    for begin in range(0, len(ids) - 1, how.chunk):
        piece = torch.tensor([ids[begin : begin + how.chunk + 1]], device=rt.device)
        inputs = piece[:, :-1]
        cache.chunk = inputs.size(1)  # shorter at the end of the prompt
        at = torch.arange(cache.chunk, device=rt.device)[None]
        chunk = tg.Chunk(inputs, piece[:, 1:], at, begin + at, torch.ones_like(at))
        tg.score_then_learn(model, chunk, slice(1), adapters, cache, learns)
    loras = adapters.unflatten(adapters.state.flat) if learns else tg.NO_ADAPTERS
    return cache, loras


@torch.no_grad()
def continue_text(
    model: tg.GPT,
    ids: Sequence[int],
    state: tuple[tg.KVCache, tg.Adapters],
    count: int,
    choose: Callable[[torch.Tensor], int],
) -> list[int]:
    """Return up to `count` new tokens after the ids; fewer if the model begins a new document.

    state: what `read_prompt` returned. choose: the next token for logits (V,).
    """
    cache, loras = state
    cache.chunk = 1
    bos = ids[0]
    written = []
    token = ids[-1]
    for _ in range(count):
        cache.advance(1)
        inputs = torch.tensor([[token]], device=cache.rt.device)
        logits = model(inputs, adapters=loras, cache=cache)
        token = choose(logits[0, 0])
        if token == bos:
            break
        written.append(token)
    return written


def make_chooser(seed: int, temperature: float) -> Callable[[torch.Tensor], int]:
    """Return a function that draws a token from logits (V,), the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def choose(logits: torch.Tensor) -> int:
        probabilities = (logits.cpu() / temperature).softmax(0)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose


def make_printable(character: str) -> str:
    """Return the character, or ? for one that could control a terminal."""
    is_text = character.isprintable() or character in "\n\t"
    return character if is_text else "?"


def sample(options: argparse.Namespace) -> None:
    """Print what follows the prompt, twice."""
    cfg = tg.read_config(os.environ)
    tg.require(options.tokens > 0, f"--tokens {options.tokens}: expected 1 or more")
    tg.require(options.temperature > 0, f"--temperature {options.temperature}: expected above 0")
    rt = tg.Runtime.create(cfg, os.environ)
    model, tokenizer = read_model(options.model, rt, cfg)
    bos = tokenizer.bos_id()
    ids = [bos, *tokenizer.encode(options.prompt)]
    tg.require(len(ids) > 1, f"--prompt {options.prompt!r:.80}: found no text; expected some")
    # `ladder` needs documents, and the prompt is one.
    stream = np.array([*ids, bos], dtype=np.uint16)
    table = tg.ByteTable.build(tokenizer)
    docs = tg.split_documents(stream, bos, 0, table, rt.device)
    how = tg.ladder(docs, model, rt)["stream"]
    for learns in (False, True):
        choose = make_chooser(options.seed, options.temperature)
        state = read_prompt(model, ids, how, rt, learns)
        written = continue_text(model, ids, state, options.tokens, choose)
        text = tokenizer.decode(ids + written).removeprefix(tokenizer.decode(ids))
        title = f"after learning from {len(ids) - 1} tokens" if learns else "without learning"
        print(f"--- {title}")
        print("".join(map(make_printable, text)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description="Write text, before and after learning from it.")
    parser.add_argument("model", help="artifact (.ptz), state dict or checkpoint (.pt)")
    parser.add_argument("--prompt", required=True, help="text that the model goes on from")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="lower: less varied")
    parser.add_argument("--seed", type=int, default=1337, help="of the draws")
    options = parser.parse_args(arguments)
    return run_command(lambda: sample(options), options.model)


if __name__ == "__main__":
    sys.exit(main())
