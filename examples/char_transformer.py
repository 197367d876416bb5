"""Trains a small transformer on real English, byte by byte, and has it go on with a text.

    python examples/char_transformer.py                # starts two nodes on this machine
    python examples/char_transformer.py --data-dir DIR # through the node that runs there
    python examples/char_transformer.py --bootstrap FILE|MULTIADDR

The text is Python's own language reference, which is on every machine with Python. Prints
the loss as it falls, the bits per character on text that it has not seen, and a sample.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

import p2pnet
from p2pnet.data.corpora import open_text, samples

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--bootstrap", default=(), help="a list of peers, or one multiaddr")
parser.add_argument("--data-dir", help="of a node that runs on this machine")
parser.add_argument("--nodes", type=int, default=2, help="to start, without the two above")
parser.add_argument("--name", default="char-transformer", help="of the network: each name once")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--micro-batches", type=int, default=2)
parser.add_argument("--width", type=int, default=96)
parser.add_argument("--blocks", type=int, default=2)
parser.add_argument("--context", type=int, default=64)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--prompt", default="The ")
parser.add_argument("--tokens", type=int, default=300)


class Block(nn.Module):
    """Attention and a layer of neurons, each with a way around it."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act = nn.GELU()
        mask = torch.triu(torch.ones(context, context, dtype=torch.bool), diagonal=1)
        self.register_buffer("future", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=self.future, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """Bytes in, and after each of them what may come next."""

    def __init__(self, width: int, blocks: int, context: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, context) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def windows(text: np.ndarray, context: int, size: int, steps: int) -> Iterator[tuple]:
    """Batches of pieces of the text, and the same a byte later."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        at = rng.integers(0, len(text) - context, size)[:, None] + np.arange(context)
        yield text[at], text[at + 1]


def bits_per_character(net: p2pnet.Network, text: np.ndarray, context: int) -> float:
    """What the network needs for a character of a text: log2 of how unlikely it found it."""
    x, y = samples(text, context)
    logits = torch.from_numpy(net(x)).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(y).flatten())
    return loss.item() / math.log(2)


@contextmanager
def local_swarm(nodes: int) -> Iterator[str]:
    """Nodes on this machine, gone afterwards; gives the first one's data directory."""
    with tempfile.TemporaryDirectory() as directory:
        peers, log = Path(directory, "peers.txt"), Path(directory, "log.txt")
        environment = {k: v for k, v in os.environ.items() if k != "P2PNET_BOOTSTRAP"}
        processes = []
        try:
            for number in range(nodes):
                command = [sys.executable, "-m", "p2pnet", "join", "--json", "--until-eof"]
                command += ["--listen", "/ip4/127.0.0.1/tcp/0"]
                command += ["--data-dir", f"{directory}/{number}"]
                command += ["--bootstrap", str(peers)] if number else []
                pipe = subprocess.PIPE
                with log.open("a") as errors:
                    process = subprocess.Popen(
                        command,
                        stdin=pipe,
                        stdout=pipe,
                        stderr=errors,
                        text=True,
                        env=environment,
                    )
                processes.append(process)
                line = process.stdout.readline()
                if not line:
                    sys.exit(f"a node did not start:\n{log.read_text()}")
                with peers.open("a") as file:
                    file.writelines(f"{addr}\n" for addr in json.loads(line)["addrs"])
            yield f"{directory}/0"
        finally:
            for process in processes:  # nothing is left to be moved anywhere: they just end
                process.kill()
                process.communicate()


def run(options: argparse.Namespace, data_dir: str | None) -> None:
    text = open_text("python-reference:train")
    model = CharTransformer(options.width, options.blocks, options.context)
    began = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        if step == 1 or step % max(1, options.steps // 30) == 0:
            bits = loss / math.log(2)
            print(
                f"step {step}: loss {loss:.3f}, {bits:.2f} bits a character, "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )

    with p2pnet.Client(options.bootstrap, data_dir=data_dir) as client:
        net = client.submit(
            model,
            name=options.name,
            input_shape=[options.context],
            optimizer={"type": "AdamW", "lr": options.lr},
            micro_batches=options.micro_batches,
            batch_max=256,
        )
        net.train(
            windows(text, options.context, options.batch_size, options.steps),
            on_step=on_step,
        )
        unseen = open_text("python-reference:test")[:20_000]
        bits = bits_per_character(net, unseen, options.context)
        print(f"on text that it has not seen: {bits:.2f} bits a character")
        began = time.monotonic()
        print(f"\n{options.prompt}", end="")
        for piece in net.generate(options.prompt, tokens=options.tokens, temperature=0.7):
            print(piece, end="", flush=True)
        print(f"\n\n{options.tokens / (time.monotonic() - began):.0f} characters a second")


if __name__ == "__main__":
    options = parser.parse_args()
    if options.bootstrap or options.data_dir:
        run(options, options.data_dir)
    else:
        with local_swarm(options.nodes) as data_dir:
            run(options, data_dir)
