"""The verb generate: text from a language model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from p2pnet.cli.options import client_options, connect, print_json


@click.command()
@click.argument("name")
@click.option("--prompt", required=True, metavar="TEXT", help="What the text begins with.")
@click.option(
    "--tokens", type=click.IntRange(1, 1_000_000), default=200, show_default=True, metavar="N",
    help="How much to add, in bytes of UTF-8.",
)  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(0, 100), default=0.8, show_default=True, metavar="T",
    help="0: always the likeliest byte; 1: as the model says; more: wilder.",
)  # fmt: skip
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default="any", metavar="K",
    help="Take one of the K likeliest bytes.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True,
    help="The same seed gives the same text.",
)  # fmt: skip
@client_options
def generate(
    name: str,
    prompt: str,
    tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    data_dir: Path,
    bootstrap: tuple[str, ...],
    as_json: bool,
) -> None:
    """Have a language model go on with a text.

    The model reads bytes of UTF-8 (examples/char_transformer.py trains one). It remembers
    as many as its context is long; when that is full, it goes on with the last half of it.
    """
    with connect(data_dir, bootstrap) as client:
        network = client.network(name)
        started = time.monotonic()
        pieces: list[str] = []
        try:
            for piece in network.generate(
                prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
            ):
                if not as_json:
                    click.echo(piece if pieces else prompt + piece, nl=False)
                pieces.append(piece)
        finally:
            if pieces and not as_json:
                click.echo()
        seconds = time.monotonic() - started
    if as_json:
        print_json(
            {"prompt": prompt, "text": "".join(pieces), "tokens": tokens, "seconds": seconds}
        )
