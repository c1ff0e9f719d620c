"""The commands that serve an artifact: text generated, labels, vectors, rankings. They need no compiler's library."""

from __future__ import annotations

import io
import json as json_format
import sys
from pathlib import Path
from typing import Annotated

import typer

from optimizer.errors import CommandError, ExitCode

app = typer.Typer()

Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all this process may use if not given.")]


@app.command()
def generate(
    folder: Artifact,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads standard input.", show_default=False)],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, tokens are drawn.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens with so much probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Draw from tokens at least so likely, relative to the first.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens seen before become less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same tokens.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")] = None,
    threads: Threads = None,
    json: AsJson = False,
) -> int:
    """Generate text with an artifact.

    The text goes to standard output as it is made, its speed to standard error.
    """
    from dataclasses import asdict

    from runtime.generation import TextGenerator
    from runtime.sampler import SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    text = _standard_input() if prompt == "-" else prompt
    asked = [{"role": "user", "content": text}] if chat else text
    stream = TextGenerator.load(folder, threads=threads).stream(
        asked, max_tokens=max_tokens, stop=stop or (), sampling=sampling
    )
    for piece in stream:
        if not json:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
    done = stream.completion
    if json:
        typer.echo(json_format.dumps(asdict(done), ensure_ascii=False))
        return ExitCode.PASS
    speed = f", {done.decode_tokens_per_s:.1f} tokens/s" if done.decode_tokens_per_s else ""
    typer.echo()
    typer.echo(f"{len(done.token_ids)} tokens, first after {done.ttft_s * 1e3:.0f} ms{speed}", err=True)
    return ExitCode.PASS


@app.command()
def predict(folder: Artifact, threads: Threads = None, json: AsJson = False) -> int:
    """Classify the lines of standard input.

    Prints the label and its probability, one line for each text. Which texts were cut to what the model reads is told
    on standard error, and by `is_cut` with --json.
    """
    from dataclasses import asdict

    from runtime.prediction import TextClassifier

    classifier = TextClassifier.load(folder, threads=threads)
    predictions = classifier.predict(_standard_lines())
    _warn(classifier.cut_note([prediction.is_cut for prediction in predictions]))
    if json:
        typer.echo(json_format.dumps([asdict(prediction) for prediction in predictions], ensure_ascii=False))
        return ExitCode.PASS
    for prediction in predictions:
        typer.echo(f"{prediction.label}\t{prediction.probability:.4f}")
    return ExitCode.PASS


@app.command()
def embed(
    folder: Artifact,
    *,
    prompt: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's prompt put before each text, such as query.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a .npy array, float32 [texts, width], instead.")
    ] = None,
    threads: Threads = None,
    json: AsJson = False,
) -> int:
    """Turn the lines of standard input into vectors.

    Prints one JSON array of numbers for each text.
    """
    from runtime.embedding import TextEmbedder

    if output is not None and output.suffix != ".npy":
        raise CommandError(f"--output: got {output}, expected a name that ends in .npy")
    embedder = TextEmbedder.load(folder, threads=threads)
    encoded = embedder.encode(_standard_lines(), prompt)
    vectors = embedder.vectors([each.ids for each in encoded])
    _warn(embedder.cut_note([each.is_cut for each in encoded]))
    if output is not None:
        import numpy

        try:
            numpy.save(output, vectors, allow_pickle=False)
        except OSError as error:
            raise CommandError(f"{output}: cannot be written, {(error.strerror or str(error)).lower()}") from None
        typer.echo(f"wrote {output}, {vectors.shape[0]} vectors of {vectors.shape[1]}")
    elif json:
        typer.echo(json_format.dumps(vectors.tolist()))
    else:
        for vector in vectors:
            typer.echo(json_format.dumps(vector.tolist()))
    return ExitCode.PASS


@app.command()
def rerank(
    folder: Artifact,
    *,
    query: Annotated[str, typer.Option(metavar="TEXT", help="What the documents should answer.", show_default=False)],
    threads: Threads = None,
    json: AsJson = False,
) -> int:
    """Order the lines of standard input by their fit to a query.

    Prints score and document, best first; with --json also its place among the lines.
    """
    from dataclasses import asdict

    from runtime.reranking import TextReranker

    reranker = TextReranker.load(folder, threads=threads)
    ranking = reranker.rank(query, _standard_lines())
    _warn(reranker.cut_note([ranked.is_cut for ranked in sorted(ranking, key=lambda ranked: ranked.index)]))
    if json:
        typer.echo(json_format.dumps([asdict(ranked) for ranked in ranking], ensure_ascii=False))
        return ExitCode.PASS
    for ranked in ranking:
        typer.echo(f"{ranked.score:.4f}\t{ranked.document}")
    return ExitCode.PASS


def _warn(note: str) -> None:
    """Print a remark to standard error, if there is one."""
    if note:
        typer.echo(note, err=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"standard input: got the byte {error.object[error.start]:#x}, expected UTF-8") from None


def _standard_lines() -> list[str]:
    """Return the lines of standard input; what Unicode calls a line separator is part of a text."""
    return [line.removesuffix("\n") for line in io.StringIO(_standard_input(), newline=None)]
