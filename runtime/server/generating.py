"""From a checked body to its answers: a place in the queue, prompts read on a thread, one request for each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from fastapi import Request

from runtime.request import Request as Asked
from runtime.server.answering import Answering, Shape
from runtime.server.errors import ApiError
from runtime.server.log import note
from runtime.server.protocol import Generation
from runtime.server.service import Served, Service

TIMEOUT: Final = "x-timeout-s"
SEED: Final = "x-seed"


async def generate(
    service: Service,
    name: str,
    served: Served,
    body: Generation,
    request: Request,
    *,
    answers: int,
    read: Callable[[], list[Asked]],
    shape: Callable[[Sequence[Asked]], Shape],
) -> Answering:
    """Return the response to a request for text.

    Args:
        service: that it came to.
        name: of the model.
        served: the model.
        body: what was asked.
        request: as it came.
        answers: how many it asks for.
        read: reads its prompts.
        shape: how answers are written, given the prompts.

    Raises:
        ApiError: it is refused.
    """
    timeout_s = read_timeout(request, service.settings.timeout_s)
    entry = service.admission.enter(answers)
    try:
        prompts = await service.read(read)
        tokens = sum(len(prompt.ids) for prompt in prompts)
        entry.weigh(tokens)
        seed = prompts[0].sampling.seed
        note(request.scope, model=name, seed=seed)
        return Answering(
            service,
            entry,
            name,
            served.engine,
            prompts,
            body.n,
            shape(prompts),
            prompt_tokens=tokens,
            is_stream=body.stream,
            timeout_s=timeout_s,
            headers={SEED: str(seed)},
        )
    except BaseException:
        entry.leave()
        raise


def read_timeout(request: Request, most: float) -> float:
    """Return the seconds that a request may take: as many as its header says, and no more than `most`."""
    given = request.headers.get(TIMEOUT)
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise ApiError(400, f"{TIMEOUT}: got {given[:40]!r}, expected seconds, more than 0", param=TIMEOUT)
    return min(seconds, most)
