"""The commands that serve an artifact: text generated, labels, vectors, rankings. They need no compiler's library."""

from __future__ import annotations

import io
import json as json_format
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from optimizer.errors import CommandError, ExitCode

app = typer.Typer()

Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="The artifact's folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of lines.")]
KVMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most memory of keys and values, such as 512M or 2G.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads; all this process may use if not given.")]


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


@app.command()
def bench(
    target: Annotated[str, typer.Argument(metavar="DIR|URL", help="An artifact, or a server.", show_default=False)],
    *,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: so many clients; 8 if neither this nor --rate is given.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Open loop: so many arrivals per second, Poisson.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many to measure; 100 if neither this nor --seconds is given.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Ask for so long, then wait for the rest.")
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before those that count.")] = 8,
    input_tokens: Annotated[str, typer.Option(metavar="N|LEAST:MOST", help="Of a prompt, drawn evenly.")] = "32:128",
    output_tokens: Annotated[str, typer.Option(metavar="N|LEAST:MOST", help="Of an answer, drawn evenly.")] = "128:256",
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSON lines {"prompt": ...} or {"messages": [...]} instead.')
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Draw words, for a server that takes no token ids.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chat completions of drawn words.")] = False,
    model: Annotated[str | None, typer.Option(help="Of a server; else its first.")] = None,
    threads: Threads = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Of an artifact: most requests at once; else --concurrency, or 8.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same prompts, lengths and arrivals.")] = 0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Limits of a good answer: ttft_ms, tpot_ms, e2e_ms. Repeatable."),
    ] = None,
    dollars_per_hour: Annotated[float | None, typer.Option(min=0, max=1e6, help="Price of the machine.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the latencies, .svg.")] = None,
    json: AsJson = False,
) -> int:
    """Put load on an artifact or a server and measure.

    A URL is any OpenAI-compatible server's; its key comes from OPENAI_API_KEY. DIR is an artifact, run in this process
    without HTTP; an encoder reads texts of equal length together. Answers are greedy and go on after EOS (ignore_eos).

    \b
    TTFT     first piece - start        E2E  last piece - start
    TPOT     (E2E - TTFT) / (n - 1) of an answer of n tokens
    ITL      between one piece of an answer and the next
    start    closed loop: when it was sent; open loop: its planned arrival
    rates    over the time from the beginning to the end of the last answer
    goodput  answers that keep every limit, per second
    cost     input: 1e6 x dollars x share / input tokens; output: 1 - share
    dollars  price x hours: all that passed (reserved), or computed (busy)
    share    prefill s / (prefill s + decode s) where the target tells them
             (DIR); else sum of TTFT / sum of E2E
    memory   (decode steps x bytes of the weights + bytes of the cache before
             each token) / decode s, beside what a plain read reaches here

    Exit codes: 0 measured, 2 wrong input or key, 4 no answers, 130 Ctrl-C, after what was measured so far.
    """
    from optimizer.drawing import require_writable, write_text
    from optimizer.traffic_report import lines, svg
    from runtime.traffic.bench import Settings, run
    from runtime.traffic.measure import Load
    from runtime.traffic.metrics import read_limits
    from runtime.traffic.workload import Range, read_prompts

    if plot is not None:
        require_writable("--plot", plot, (".svg",))
    if rate is None and concurrency is None:
        concurrency = 8
    if requests is None and seconds is None:
        requests = 100
    done = run(
        target,
        Settings(
            load=Load(concurrency=concurrency, rate=rate, requests=requests, seconds=seconds, warm_up=warm_up),
            input_tokens=Range.parse("--input-tokens", input_tokens),
            output_tokens=Range.parse("--output-tokens", output_tokens),
            prompts=read_prompts(prompts, chat) if prompts else (),
            form="chat" if chat else "text" if text else "ids",
            model=model,
            threads=threads,
            slots=slots,
            seed=seed,
            limits=read_limits(goodput or ()),
            dollars_per_hour=dollars_per_hour,
        ),
    )
    typer.echo(done.to_json() if json else "\n".join(lines(done)))
    if plot is not None:
        write_text(plot, svg(done))
    return ExitCode.PASS if done.is_complete else ExitCode.INTERRUPTED


@contextmanager
def _bar(is_shown: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Draw a bar on standard error; it is told what is done, of how much, and a remark."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as bars:
        task = bars.add_task("")
        yield lambda done, total, remark: bars.update(task, completed=done, total=total, description=remark)


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


@app.command()
def serve(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Artifacts, named as their folders, or NAME=DIR.")
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests that run at once; 8 if not given.")] = None,
    kv_memory: KVMemory = None,
    context: Annotated[int | None, typer.Option(min=1, help="Most tokens of a prompt and its answer.")] = None,
    max_stall_ms: Annotated[
        float,
        typer.Option(
            metavar="MS", help="Longest a piece of a prompt keeps other answers waiting; four pieces at most."
        ),
    ] = 60.0,
    threads: Threads = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="API keys, one a line; OPTIMIZE_API_KEYS holds others.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further name the server is called by. Repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A web site whose pages may ask. Repeatable.")
    ] = None,
    queue: Annotated[int, typer.Option(metavar="N", help="Requests that may wait; more get a 429.")] = 256,
    queue_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of their prompts together.")] = 1 << 18,
    timeout_s: Annotated[float, typer.Option(metavar="S", help="An answer ends after so long.")] = 600.0,
    drain_s: Annotated[float, typer.Option(metavar="S", help="Answers may go on so long after SIGTERM.")] = 30.0,
    dollars_per_hour: Annotated[
        float | None, typer.Option(metavar="USD", min=0, max=1e6, help="What the machine costs, for /metrics.")
    ] = None,
    digest: Annotated[str | None, typer.Option(metavar="HEX", help="The identity a single artifact must have.")] = None,
) -> int:
    """Serve artifacts over HTTP, as OpenAI's clients speak it.

    Listens at 127.0.0.1:8000 if not told otherwise. SIGTERM or Ctrl-C lets the answers under way end first; a second
    one does not.
    """
    import os

    from runtime.server.app import create_app
    from runtime.server.loading import EngineOptions, load, named
    from runtime.server.run import bind, run
    from runtime.server.settings import Settings, read_api_keys

    if digest is not None and len(folders) > 1:
        raise CommandError(f"--digest: got {len(folders)} artifacts, expected one")
    settings = Settings(
        host=host,
        port=port,
        api_keys=read_api_keys(api_key_file, os.environ.get("OPTIMIZE_API_KEYS", "")),
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        queue=queue,
        queue_tokens=queue_tokens,
        timeout_s=timeout_s,
        drain_s=drain_s,
        dollars_per_hour=dollars_per_hour,
    )
    options = EngineOptions(
        slots=slots, kv_memory=_size(kv_memory), context=context, threads=threads, max_stall_ms=max_stall_ms
    )
    bound = bind(settings)  # before minutes of loading
    served = {name: load(folder, options, digest) for name, folder in named(folders).items()}

    def announce(address: str) -> None:
        for name, each in served.items():
            typer.echo(f"serving {name} at {address}: {each.described}")
        sys.stdout.flush()

    run(create_app(served, settings), settings, bound, announce)
    return ExitCode.PASS


@app.command()
def batch(
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="Requests, OpenAI's batch lines (.jsonl).", show_default=False)
    ],
    answers: Annotated[Path, typer.Argument(metavar="OUT", help="Where answers go (.jsonl).", show_default=False)],
    folders: Annotated[
        list[str],
        typer.Option("--model", metavar="DIR", help="An artifact, named as its folder, or NAME=DIR. Repeatable."),
    ],
    *,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests that run at once; 8 if not given.")] = None,
    kv_memory: KVMemory = None,
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but mistakes.")] = False,
) -> int:
    """Answer a file of requests as `serve` would.

    A run that was interrupted or killed goes on where it was when it is started again. Exit codes: 0 each request has
    an answer, 2 the input is wrong, or some requests were refused: their lines in OUT say why.
    """
    from runtime.server.batch import run_batch
    from runtime.server.loading import EngineOptions, load, named

    options = EngineOptions(slots=slots, kv_memory=_size(kv_memory), threads=threads)
    served = {name: load(folder, options) for name, folder in named(folders).items()}
    with _bar(is_shown=sys.stderr.isatty() and not quiet) as bar:
        done = run_batch(
            served,
            requests,
            answers,
            at_once=2 * len(served) * (slots or 8),
            told=lambda now: bar(now.before + now.answered, now.requests, f"{now.output_tokens:,} tokens"),
        )
    if not quiet:
        before = f", {done.before} of an earlier run" if done.before else ""
        typer.echo(f"wrote {answers}: {done.answered} answers{before}, {done.refused} refused", err=True)
    return ExitCode.WRONG_INPUT if done.refused else ExitCode.PASS


def _size(text: str | None) -> int | None:
    """Return the bytes of 1000000, 512M or 2G."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text.upper())
    if found is None:
        raise CommandError(f"--kv-memory: got {text[:40]!r}, expected bytes, or such as 512M or 2G")
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]
