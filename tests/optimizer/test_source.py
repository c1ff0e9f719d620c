"""What `load_source` takes, what it refuses and in which words, and how it gets a model from a Hub."""

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from optimizer.errors import CannotRun, CommandError, ExitCode
from optimizer.source import check_finite, find_license, load_source, source_identity
from optimizer.store import Store
from passes.base import TORCH

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "F8_E4M3": 1}
COMMIT, LATER = "c0ffee" + "0" * 34, "decade" + "0" * 34
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
TENSORS = {"model.embed_tokens.weight": ("F16", [8, 4]), "model.norm.weight": ("F16", [4])}

Damage = Callable[[Path], object]


def safetensors_bytes(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, count = end, SIZES[dtype]
        for size in shape:
            count *= size
        end += count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int]]] = TENSORS) -> None:
    path.write_bytes(safetensors_bytes(tensors))


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content))


def write_tokenizer(path: Path, tokens: int = 8, added: int = 0) -> None:
    vocabulary = {f"t{index}": index for index in range(tokens)}
    write_json(path, model={"vocab": vocabulary}, added_tokens=[{"id": tokens + index} for index in range(added)])


def write_shards(folder: Path) -> None:
    weight_map = {}
    for number, (name, info) in enumerate(TENSORS.items(), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        write_tensors(folder / shard, {name: info})
        weight_map[name] = shard
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_json(folder / "model.safetensors.index.json", weight_map=weight_map)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    write_json(folder / "config.json", **CONFIG)
    write_tokenizer(folder / "tokenizer.json")
    write_tensors(folder / "model.safetensors")
    return folder


def test_a_folder_becomes_a_model_at_stage_torch(folder: Path) -> None:
    source = load_source(str(folder))
    assert (source.model.stage, source.model.folder, source.model.config) == (TORCH, folder, CONFIG)
    assert source.lineage == {"base_model": "tiny-llama", "revision": None, "license": None}


def test_shards_and_links_are_taken(folder: Path, tmp_path: Path) -> None:
    write_shards(folder)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert load_source(str(linked)).model.folder == linked


def test_integer_buffers_beside_the_weights_are_taken(folder: Path) -> None:
    write_tensors(folder / "model.safetensors", {**TENSORS, "embeddings.position_ids": ("I64", [1, 8])})
    load_source(str(folder))


def test_code_beside_a_model_that_transformers_knows_is_never_needed(folder: Path) -> None:
    write_json(folder / "config.json", **CONFIG, auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    load_source(str(folder))


def change_config(**changes: Any) -> Damage:
    return lambda folder: write_json(folder / "config.json", **{**CONFIG, **changes})


def change_weights(**tensors: tuple[str, list[int]]) -> Damage:
    return lambda folder: write_tensors(folder / "model.safetensors", {**TENSORS, **tensors})


def only(*names: str) -> Damage:
    def keep(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(b"x")

    return keep


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def remove_shard(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def swap_shards(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "a")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "a").rename(folder / "model-00002-of-00002.safetensors")


REFUSALS: dict[str, tuple[Damage, str]] = {
    "no configuration": (remove("config.json"), "no config.json"),
    "broken configuration": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "configuration is a list": (lambda f: (f / "config.json").write_text("[]"), "got a JSON list"),
    "no model type": (change_config(model_type=None), "no model_type"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "no vocabulary in it"),
    "empty tokenizer": (lambda f: write_tokenizer(f / "tokenizer.json", 0), "vocabulary is empty"),
    "large tokenizer": (
        lambda f: write_tokenizer(f / "tokenizer.json", 9),
        "largest token id is 8, expected below vocab_size 8",
    ),
    "added token": (lambda f: write_tokenizer(f / "tokenizer.json", 8, added=1), "largest token id is 8"),
    "unigram tokenizer": (
        lambda f: write_json(f / "tokenizer.json", model={"vocab": [["a", -1.0]] * 9}),
        "largest token id is 8",
    ),
    "pickle": (only("pytorch_model.bin"), r"weights as pickle \(pytorch_model.bin\)"),
    "checkpoint": (only("last.ckpt"), r"weights as pickle \(last.ckpt\)"),
    "gguf": (only("model.gguf"), "no weights, got model.gguf"),
    "no weights": (only(), "no weights, expected model.safetensors"),
    "adapter": (lambda f: write_json(f / "adapter_config.json"), "an adapter, not a model"),
    "quantized": (change_config(quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
    "remote code": (
        change_config(model_type="mine", auto_map={"AutoModel": "m.M"}),
        r"remote code \(auto_map\).* mine",
    ),
    "remote class": (
        change_config(architectures=["MyLlama"], auto_map={"AutoModel": "m.MyLlama"}),
        r"remote code \(auto_map\).* MyLlama",
    ),
    "remote module": (
        lambda f: (change_config(model_type="mine")(f), (f / "modeling_mine.py").touch()),
        r"remote code \(modeling_mine.py\)",
    ),
    "cut weights": (cut_weights, r"model.safetensors: damaged or truncated"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "damaged"),
    "missing shard": (remove_shard, "1 of 2 shards are missing, first model-00002-of-00002.safetensors"),
    "swapped shards": (swap_shards, "model-00001-of-00002.safetensors lacks tensor"),
    "broken index": (
        lambda f: (write_shards(f), write_json(f / "model.safetensors.index.json")),
        "no `weight_map` in it",
    ),
    "float64": (change_weights(x=("F64", [2])), "tensor x has dtype F64, expected F32, F16, BF16"),
    "float8": (change_weights(x=("F8_E4M3", [2])), "tensor x has dtype F8_E4M3"),
    "packed integers": (change_weights(**{"a.qweight": ("I32", [2])}), "tensor a.qweight has dtype I32"),
    "embedding": (change_config(vocab_size=9), "has 8 rows, expected vocab_size 9"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_lowered_is_refused_in_one_line(folder: Path, case: str) -> None:
    damage, words = REFUSALS[case]
    damage(folder)
    with pytest.raises(CannotRun, match=words) as caught:
        load_source(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("model", ["no/such/folder", "name-alone", "/absolute/path", "a/b@"])
def test_neither_a_folder_nor_a_hub_id_is_a_mistake_of_the_command(model: str) -> None:
    with pytest.raises(CommandError, match="no such folder") as caught:
        load_source(model)
    assert caught.value.exit_code == ExitCode.WRONG_INPUT


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F32", 0x7F800000), ("F32", 0xFFC00001), ("F16", 0x7C00), ("F16", 0xFE00), ("BF16", 0xFF80), ("BF16", 0x7FC0)],
)
def test_nan_and_infinity_are_found_and_named(folder: Path, dtype: str, bits: int) -> None:
    path = folder / "model.safetensors"
    write_tensors(path, {"fine": (dtype, [1000]), "layer.weight": (dtype, [1_000_000])})
    content = bytearray(path.read_bytes())
    size = SIZES[dtype]
    content[-size:] = bits.to_bytes(size, "little")  # the very last value, several chunks in
    path.write_bytes(content)
    with pytest.raises(CannotRun, match=r"NaN or infinity in tensor layer\.weight;"):
        check_finite(load_source(str(folder)), Store(folder.parent / "store"))


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 0x7F7FFFFF), ("F16", 0xFBFF), ("BF16", 0x7F7F)])
def test_the_largest_finite_value_passes(folder: Path, dtype: str, bits: int) -> None:
    path = folder / "model.safetensors"
    write_tensors(path, {"a": (dtype, [1])})
    path.write_bytes(path.read_bytes()[: -SIZES[dtype]] + bits.to_bytes(SIZES[dtype], "little"))
    check_finite(load_source(str(folder)), Store(folder.parent / "store"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_identity_changes_with_every_file_that_matters(folder: Path, name: str) -> None:
    store = Store(folder.parent / "store")
    source = load_source(str(folder))
    before = source_identity(source, store)
    (folder / "README.md").write_text("not part of it")
    assert source_identity(source, store) == before
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert source_identity(source, store) != before


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("README.md", "---\nlanguage: en\nlicense: mit\n---\n# A model", "mit"),
        ("README.md", "---\nlicense: [apache-2.0]\n---\n", "apache-2.0"),
        ("README.md", "---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("README.md", "---\nlicense: [unclosed\n---\n", None),
        ("README.md", "# A model\nlicense: mit", None),
        ("LICENSE", "Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        ("LICENSE.md", "Do what you like", "see LICENSE.md"),
        ("NOTICE", "MIT License", None),
    ],
)
def test_the_licence_is_read_from_card_or_licence_file(
    tmp_path: Path, name: str, text: str, expected: str | None
) -> None:
    (tmp_path / name).write_text(text)
    assert find_license(tmp_path) == expected


def test_the_checks_need_neither_torch_nor_transformers(folder: Path) -> None:
    script = "import sys; from optimizer.source import load_source; load_source(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "huggingface_hub"} & set(done.stdout.split())


HUB_REFUSALS = {"org/gated": (401, "GatedRepo"), "org/missing": (401, "RepoNotFound"), "org/forbidden": (403, "")}


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that fetching a model uses: model info, tree, and files by commit."""

    files: dict[str, bytes]
    requests: list[tuple[str, str, str, str]]  # method, path, Authorization, User-Agent
    heads: list[str]  # the commit `main` is at for each question in turn; the last one stays

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "")
        self.requests.append((self.command, path, token, self.headers.get("User-Agent", "")))
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        tail = path.partition(repository)[2]
        refusal = HUB_REFUSALS.get(repository)
        if repository == "org/private" and token != "Bearer hf_secret":
            refusal = (401, "RepoNotFound")
        if tail.startswith(("/revision/", "/tree/")) and tail.split("/")[2] not in ("main", COMMIT, LATER):
            refusal = (404, "RevisionNotFound")
        if refusal:
            self.send(refusal[0], b"{}", with_body, {"X-Error-Code": refusal[1]})
        elif tail.startswith("/revision/"):
            head = self.heads.pop(0) if len(self.heads) > 1 else self.heads[0]
            self.send(200, json.dumps({"id": repository, "sha": head, "siblings": []}).encode(), with_body)
        elif tail.startswith("/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.send(200, json.dumps(tree).encode(), with_body)
        else:
            _, _, commit, name = tail.split("/", 3)
            content = self.files[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.send(200, content, with_body, {"ETag": etag, "X-Repo-Commit": commit})

    def send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Stay silent."""


class FakeHub:
    def __init__(self, address: str, handler: type[Hub], home: Path) -> None:
        self.address, self.handler, self.home = address, handler, home

    def load(self, model: str, **environment: str) -> dict[str, Any]:
        """Load a model in a process of its own, because huggingface_hub reads its environment when imported."""
        script = """
import json, sys
from optimizer.errors import OptimizeError
from optimizer.source import load_source
steps = []
try:
    source = load_source(sys.argv[1], progress=lambda done, total, what: steps.append([done, total]))
    print(json.dumps({**source.lineage, "folder": str(source.model.folder), "steps": steps}))
except OptimizeError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
"""
        cleared = ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "https_proxy", "all_proxy")
        inherited = {
            key: value for key, value in os.environ.items() if key not in cleared and key.lower() not in cleared
        }
        settings = {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, model],
            capture_output=True,
            text=True,
            check=True,
            env={**inherited, **settings, **environment},
        )
        assert "hf_secret" not in done.stdout + done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[FakeHub]:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "modeling.py").write_text("raise SystemExit")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    handler = type("Handler", (Hub,), {"files": files, "requests": [], "heads": [COMMIT]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield FakeHub(f"http://127.0.0.1:{server.server_port}", handler, tmp_path / "home")
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_is_fetched_once_and_its_commit_recorded(hub: FakeHub) -> None:
    loaded = hub.load("org/tiny@main")
    assert (loaded["base_model"], loaded["revision"], loaded["license"]) == ("org/tiny", COMMIT, "apache-2.0")
    fetched = {path.name for path in Path(loaded["folder"]).iterdir()}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors", "README.md"}
    weights = len(hub.handler.files["model.safetensors"])
    assert loaded["steps"][-1] == [weights, weights]
    hub.handler.requests.clear()
    assert hub.load("org/tiny")["folder"] == loaded["folder"]
    assert not [path for method, path, *_ in hub.handler.requests if method == "GET" and "/resolve/" in path]


def test_shards_are_fetched_by_their_index(hub: FakeHub, folder: Path) -> None:
    write_shards(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        del hub.handler.files[name]
    hub.handler.files.update({path.name: path.read_bytes() for path in folder.glob("model*")})
    hub.handler.files["model-of-another-kind.safetensors"] = b"never fetched"
    loaded = hub.load(f"org/tiny@{COMMIT}")
    assert len(list(Path(loaded["folder"]).glob("*.safetensors"))) == 2


def test_a_branch_that_moves_meanwhile_does_not_mix_two_commits(hub: FakeHub) -> None:
    hub.handler.heads[:] = [COMMIT, LATER]
    loaded = hub.load("org/tiny")
    assert loaded["revision"] == COMMIT and loaded["steps"]
    assert not [path for _, path, *_ in hub.handler.requests if LATER in path]


def test_the_token_is_sent_but_never_kept_or_printed(hub: FakeHub) -> None:
    assert "org/private: not found" in hub.load("org/private")["error"]
    assert hub.load("org/private", HF_TOKEN="hf_secret")["revision"] == COMMIT
    assert {token for _, _, token, _ in hub.handler.requests[-3:]} == {"Bearer hf_secret"}
    kept = [path for path in hub.home.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert kept == []


def test_the_request_says_nothing_of_the_machine(hub: FakeHub) -> None:
    hub.load("org/tiny")
    agents = {agent for *_, agent in hub.handler.requests}
    assert agents and not any("torch/" in agent for agent in agents)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/gated", "gated; accept its terms at http"),
        ("org/missing", "not found at http"),
        ("org/forbidden", "refused by http"),
        ("org/tiny@v9", "no such revision, got v9"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(hub: FakeHub, model: str, words: str) -> None:
    refused = hub.load(model)
    assert refused["error"].startswith(f"model {model}: {words}")
    assert "\n" not in refused["error"] and refused["code"] == ExitCode.CANNOT_RUN


def test_without_a_network_the_cache_answers_or_one_line_says_so(hub: FakeHub) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "cannot reach http://127.0.0.1:9" in hub.load("org/tiny", **nowhere)["error"]
    folder = hub.load("org/tiny")["folder"]
    assert hub.load("org/tiny", **nowhere)["folder"] == folder
    assert hub.load("org/tiny", HF_HUB_OFFLINE="1")["folder"] == folder


def test_a_refused_configuration_ends_before_the_weights_are_fetched(hub: FakeHub) -> None:
    hub.handler.files["config.json"] = json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}).encode()
    assert "already quantized (awq)" in hub.load("org/tiny")["error"]
    assert not [path for _, path, *_ in hub.handler.requests if path.endswith("model.safetensors")]


def test_a_hub_model_of_pickles_is_refused_by_name(hub: FakeHub) -> None:
    del hub.handler.files["model.safetensors"]
    assert "org/tiny: weights as pickle (pytorch_model.bin)" in hub.load("org/tiny")["error"]
    assert not [path for _, path, *_ in hub.handler.requests if path.endswith(".bin")]
