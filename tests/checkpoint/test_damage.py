"""Damaged and hostile files: an error of gradstep's, nothing changed, and little memory."""

import copy
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradstep as gs
from checkpoints import answer, bits_of, everything, halves, tree
from gradstep.checkpoint.checkpoint_file import _digest

KNOWN = {"halves": halves}


def make() -> Any:
    children = [
        gs.SGD(halves, momentum={"b": gs.step_decay(0.5, 0.5, 2), "*": 0.9}),
        gs.Adam(
            gs.join_schedules([gs.linear_schedule(0.0, 0.1, 2), gs.cosine_decay(0.1, 9)], [2]),
            slot_dtype={"m": "int8"}, rounding="stochastic", seed=3,
        ),
    ]  # fmt: skip
    multi = gs.MultiOptimizer(children, ["[bs]"], clip_norm=1.0, nonfinite="skip", frozen=["x*"])
    return gs.Accumulate(multi, every=3)


def few(seed: int) -> Any:
    return {name: array for name, array in tree(seed).items() if name in "bst"}


class Saved:
    """A file, and an optimizer with parameters that it would fit."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "a.safetensors"
        opt, params = make(), few(0)
        for seed in range(1, 5):
            opt.apply_gradients(few(seed), params)
        opt.save(self.path, params)
        self.whole = self.path.read_bytes()
        self.opt, self.params = make(), few(5)
        self.opt.apply_gradients(few(6), self.params)
        self.before = everything(self.opt), bits_of(self.params)
        self.loaded = everything(opt), bits_of(params)

    @property
    def header_length(self) -> int:
        return int.from_bytes(self.whole[:8], "little")

    def header(self) -> dict[str, Any]:
        return json.loads(self.whole[8 : 8 + self.header_length])

    def assert_refused(self, content: bytes, kind: Any = gs.CheckpointError, what: str = "") -> None:
        """Neither way of loading takes the file, and nothing has changed."""
        self.path.write_bytes(content)
        with pytest.raises(kind):
            print(what, self.opt.load(self.path, self.params))
        assert (everything(self.opt), bits_of(self.params)) == self.before, what
        others = copy.deepcopy(self.params)
        with pytest.raises(kind):
            gs.load(self.path, others, functions=KNOWN)
        assert bits_of(others) == self.before[1], what


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def test_the_whole_file_loads(saved: Saved) -> None:
    saved.opt.load(saved.path, saved.params)
    assert (everything(saved.opt), bits_of(saved.params)) == saved.loaded


# Bytes


def regions(saved: Saved) -> dict[str, list[int]]:
    """Where bytes of each kind lie."""
    whole, start = saved.whole, 8 + saved.header_length

    def within(text: str, count: int = 1) -> list[int]:
        at = whole.index(text.encode())
        return list(range(at, at + len(text) * count))

    header = saved.header()
    found = {
        "length": list(range(8)), "metadata's key": within("__metadata__"), "document's key": within('"gradstep"'),
        "digest": within(header["__metadata__"]["gradstep.digest"]), "hashes' key": within("gradstep.sha256"),
        "dtype": within('"dtype":"F32"'), "offsets": within('"data_offsets":['), "shape": within('"shape":['),
        "braces": [8, 8 + len(whole[8:start].rstrip()) - 1], "document": within("hyperparameters"),
        "step": within('micro_step\\":1'),
        "hash": within(next(iter(json.loads(header["__metadata__"]["gradstep.sha256"]).values()))),
    }  # fmt: skip
    for key, entry in header.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            found[f"tensor {key}"] = [start + begin, start + end - 1, start + (begin + end) // 2]
            found[f"name {key}"] = within(json.dumps(key))
    return found


def test_a_byte_changed_anywhere_is_noticed(saved: Saved) -> None:
    chance = random.Random(0)
    places = regions(saved)
    assert len(places) > 20
    chosen = [place for some in places.values() for place in {some[0], some[-1], chance.choice(some)}]
    chosen += [chance.randrange(len(saved.whole)) for _ in range(300)]
    padding = set(range(len(saved.whole[: 8 + saved.header_length].rstrip()), 8 + saved.header_length))
    for place in chosen:
        content = bytearray(saved.whole)
        content[place] ^= chance.randrange(1, 256)
        if place in padding and content[place] in b"\t\n\r ":
            continue  # another space
        saved.assert_refused(bytes(content), what=f"byte {place}")


def test_padding_of_other_bytes_is_noticed(saved: Saved) -> None:
    """The header is padded to a multiple of 8, in all documents of some length."""
    end = 8 + saved.header_length
    header = saved.whole[8:end].rstrip()
    for byte in (b"\x00", b"x", b"}", b",", b"\xff"):
        padded = header + byte * 8
        saved.assert_refused(len(padded).to_bytes(8, "little") + padded + saved.whole[end:])


def test_a_file_that_is_cut_is_noticed(saved: Saved) -> None:
    for percent in range(100):
        saved.assert_refused(saved.whole[: len(saved.whole) * percent // 100], what=f"{percent} %")
    saved.assert_refused(saved.whole[:-1])
    saved.assert_refused(saved.whole + b"\x00")
    saved.assert_refused(saved.whole + saved.whole)


def test_tensors_of_the_same_form_that_changed_places_are_noticed(saved: Saved) -> None:
    header, start = saved.header(), 8 + saved.header_length
    alike = [key for key, entry in header.items() if entry.get("shape") == [7] and entry["dtype"] == "F32"]
    first, second = (header[key]["data_offsets"] for key in alike[:2])
    content = bytearray(saved.whole)
    content[start + first[0] : start + first[1]], content[start + second[0] : start + second[1]] = (
        saved.whole[start + second[0] : start + second[1]], saved.whole[start + first[0] : start + first[1]],
    )  # fmt: skip
    saved.assert_refused(bytes(content))


# Containers


def container(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def hostile(saved: Saved) -> Iterator[tuple[str, bytes]]:
    header, payload = saved.header(), saved.whole[8 + saved.header_length :]
    metadata = header["__metadata__"]
    keys = [key for key in header if key != "__metadata__"]

    def changed(key: str, **entries: Any) -> bytes:
        return container({**header, key: {**header[key], **entries}}, payload)

    for length in (2**40, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000, 100_000_001, len(saved.whole), 0, 1, 2, 7):
        yield f"length {length}", container(saved.whole[8:], length=length)
    for text in (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}", b"NaN", b"{}{}"):
        yield f"header {text!r}", container(text)
    yield "deep", container(b"[" * 100_000 + b"]" * 100_000)
    yield "deep mapping", container(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield (
        "many digits",
        container(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,4]}}', b"4444"),
    )
    yield "NaN", container(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"4444")
    for bad in (None, 1, "x", [], {"gradstep": 1}, {"gradstep": None}, {"gradstep": {}}, {}):
        yield f"metadata {bad}", container({**header, "__metadata__": bad}, payload)
    for name in metadata:
        yield (
            f"without {name}",
            container({**header, "__metadata__": {n: metadata[n] for n in metadata if n != name}}, payload),
        )
        for text in ("", "{}", "[]", "null", "NaN", "1e999", "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\x00"):
            yield f"{name} {text[:5]}", container({**header, "__metadata__": {**metadata, name: text}}, payload)
    text = saved.whole[8 : 8 + saved.header_length].rstrip()
    extra = json.dumps({keys[0]: header[keys[0]]}).encode()[1:]
    yield "duplicate", container(text[:-1] + b"," + extra, payload)
    yield "two metadata", container(text[:-1] + b',"__metadata__":{}}', payload)
    key, entry = keys[0], header[keys[0]]
    begin, end = entry["data_offsets"]
    for offsets in (
        [end, begin], [begin + 1, end + 1], [begin, 2**62], [-4, end], [0, 0], [begin], [], None, "x", [begin, end, 0],
        [float(begin), float(end)], [str(begin), str(end)], [True, end], [2**64, 2**64 + end], [10**30, 10**30 + end],
    ):  # fmt: skip
        yield f"offsets {offsets}", changed(key, data_offsets=offsets)
    for shape in (
        None, "x", [], [-1, -7], [0], [2**62], [2**40, 2**40], [1] * 1000, [[7]], [7.0], [True], ["7"], {"0": 7},
        [10**40],
    ):  # fmt: skip
        yield f"shape {shape}", changed(key, shape=shape)
    for dtype in (None, 1, "", "f32", "F8_E4M3", "F31", "float32", ["F32"], {}, "I32", "BOOL"):
        yield f"dtype {dtype}", changed(key, dtype=dtype)
    yield "overlap", changed(keys[1], data_offsets=entry["data_offsets"])
    yield "other fields", changed(key, more=1)
    for bad in (None, [], 1, "x", {}):
        yield f"entry {bad}", container({**header, key: bad}, payload)
    yield (
        "one more",
        container(
            {**header, "more": {"dtype": "F32", "shape": [1], "data_offsets": [len(payload), len(payload) + 4]}},
            payload + b"4444",
        ),
    )
    yield (
        "an empty one more",
        container({**header, "more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, payload),
    )
    yield "one less", container({n: e for n, e in header.items() if n != keys[-1]}, payload)
    yield "another name", container({(n if n != key else n + "x"): e for n, e in header.items()}, payload)
    yield "no tensors", container({"__metadata__": metadata})


def test_hostile_headers_are_refused_with_little_memory(saved: Saved) -> None:
    for what, content in hostile(saved):
        saved.assert_refused(content, what=what)
        tracemalloc.start()
        with pytest.raises(gs.CheckpointError):
            gs.load(saved.path, functions=KNOWN)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 30_000_000 + 20 * len(content), what


def test_a_header_in_another_order_is_the_same_file(saved: Saved) -> None:
    header, payload = saved.header(), saved.whole[8 + saved.header_length :]
    saved.path.write_bytes(container(dict(reversed(header.items())), payload))
    saved.opt.load(saved.path, saved.params)
    assert (everything(saved.opt), bits_of(saved.params)) == saved.loaded


# Documents that are signed


def signed(saved: Saved, document: Any, hashes: Any = None) -> bytes:
    """The file with another description of the optimizer, and a digest that is right for it."""
    header, payload = saved.header(), saved.whole[8 + saved.header_length :]
    metadata = dict(header["__metadata__"])
    metadata["gradstep"] = document if isinstance(document, str) else json.dumps(document)
    if hashes is not None:
        metadata["gradstep.sha256"] = hashes if isinstance(hashes, str) else json.dumps(hashes)
    dtypes = {"F32": "float32", "U8": "uint8", "F64": "float64", "BF16": "bfloat16"}
    forms = {k: (dtypes[e["dtype"]], tuple(e["shape"])) for k, e in header.items() if k != "__metadata__"}
    metadata["gradstep.digest"] = _digest(metadata, forms)
    return container({**header, "__metadata__": metadata}, payload)


def document_of(saved: Saved) -> Any:
    return json.loads(saved.header()["__metadata__"]["gradstep"])


def nodes(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from nodes(value, (*path, key))


def with_node(data: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    data = copy.deepcopy(data)
    if not path:
        return change(data)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = change(parent[path[-1]])
    return data


OTHERS: list[Any] = [
    None, True, False, 0, 1, -1, 2**63 - 1, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308,
    "", "x", "\ud800", "nan", "float32", [], [1], [[]], ["x"], [None], {}, {"x": 1},
    {"float": "nan"}, {"float": "1"}, {"tuple": [0.5, 0.5]}, {"tuple": 1},
    {"globs": {}}, {"globs": {"*": 0.5}}, {"globs": {"*": {"globs": {"*": 1}}}},
    {"function": "halves"}, {"function": 3}, {"function": "nobody"}, {"schedule": "cosine_decay"},
    {"schedule": "cosine_decay", "init": 1, "decay_steps": -1, "end": 0},
    {"schedule": "cosine_decay", "init": "x", "decay_steps": [], "end": {}},
    {"schedule": "join_schedules", "schedules": [1, "x"], "boundaries": [0]}, {"schedule": "__init__"},
    {"schedule": None}, {"glob": "*"}, {"glob": 3}, {"kind": "rule"}, {"kind": "multi", "routes": []},
]  # fmt: skip


def use(opt: Any, params: Any) -> None:
    """Whatever has been loaded can be looked at, and steps or says why not."""
    everything(opt)
    try:
        opt.preflight()
        for seed in (7, 8, 9):
            opt.apply_gradients(few(seed), params)
    except gs.GradstepError:
        return
    everything(opt)


def complaint(saved: Saved, what: str, content: bytes) -> str | None:
    """What is wrong with how a file is loaded that has been signed, but makes no sense."""
    saved.path.write_bytes(content)
    opt, params = copy.deepcopy((saved.opt, saved.params))
    for name in ("load", "gs.load"):
        try:
            if name == "load":
                opt.load(saved.path, params)
            else:
                params = copy.deepcopy(saved.params)
                opt = gs.load(saved.path, params, functions=KNOWN)
        except gs.GradstepError:
            changed = bits_of(params) != saved.before[1] or (name == "load" and everything(opt) != saved.before[0])
            if changed:
                return f"{what}: {name} was refused, but something has changed"
            continue
        except Exception as error:
            return f"{what}: {name} raised {type(error).__name__}: {str(error)[:100]}"
        try:
            use(opt, params)
        except Exception as error:
            return f"{what}: after {name}, a step raised {type(error).__name__}: {str(error)[:100]}"
        opt, params = copy.deepcopy((saved.opt, saved.params))
    return None


@pytest.mark.parametrize("part", range(2))
def test_whatever_a_signed_document_says_is_taken_or_refused(saved: Saved, part: int) -> None:
    document = document_of(saved)
    places = [place for place in nodes(document) if place[-1:] != ("filter",)]  # see below
    assert len(places) > 100
    chance, found = random.Random(part), []
    for place in places[part::2]:
        for other in chance.sample(OTHERS, 5):
            content = signed(saved, with_node(document, place, lambda _, other=other: other))
            found.append(complaint(saved, f"{'/'.join(map(str, place))} = {str(other)[:40]}", content))
    found = [text for text in found if text]
    assert not found, "\n".join(found[:60])


NO_FILTERS = [True, 0, "x", [], {}]


@pytest.mark.parametrize(
    "bad",
    [
        *({"x": 1}, {"glob": None}, {"function": None}, {"tuple": []}, {"function": []}, {"glob": 1}, None),
        *(b for b in NO_FILTERS),
    ],
    ids=str,
)
def test_a_filter_of_another_type_is_refused(saved: Saved, bad: Any) -> None:
    place = ("optimizer", "optimizer", "routes", 0, "filter")
    content = signed(saved, with_node(document_of(saved), place, lambda _: bad))
    saved.assert_refused(content, gs.GradstepError)


def test_an_entry_left_out_or_added_is_taken_or_refused(saved: Saved) -> None:
    document, found = document_of(saved), []
    for place in nodes(document):
        if place and place[-1] != "glob":  # see above

            def without(parent: Any, key: Any = place[-1]) -> Any:
                return (
                    {k: v for k, v in parent.items() if k != key}
                    if isinstance(parent, dict)
                    else (parent[:key] + parent[key + 1 :])
                )

            changed = with_node(document, place[:-1], without)
            found.append(complaint(saved, f"without {'/'.join(map(str, place))}", signed(saved, changed)))
        for kind in (dict, list):
            add = (lambda data: {**data, "more": 1}) if kind is dict else (lambda data: [*data, "more"])
            node = document
            for key in place:
                node = node[key]
            if isinstance(node, kind):
                content = signed(saved, with_node(document, place, add))
                found.append(complaint(saved, f"one more in {'/'.join(map(str, place))}", content))
    found = [text for text in found if text]
    assert not found, "\n".join(found[:60])


def test_signed_texts_that_are_no_document_are_refused(saved: Saved) -> None:
    text = json.dumps(document_of(saved))
    bad = [
        "", "[]", "null", "NaN", "{}", "[" * 100_000, '{"a":' * 100_000, '{"format":' + "9" * 5000 + "}", text + "x",
        text.replace('"step":', '"step": NaN, "x":', 1), text.replace('"step":', '"step": Infinity, "x":', 1),
        text.replace('"step":', '"step": 1, "step":', 1), text.replace("1", "1" * 5000, 1),
    ]  # fmt: skip
    for content in bad:
        saved.assert_refused(signed(saved, content), what=content[:40])
    hashes = json.loads(saved.header()["__metadata__"]["gradstep.sha256"])
    key = next(iter(hashes))
    others = [
        {}, [], "null", "x", {**hashes, key: 1}, {**hashes, key: ""}, {**hashes, key: None}, {**hashes, "x": "y"},
        {k: v for k, v in hashes.items() if k != key}, "[" * 100_000, "NaN",
    ]  # fmt: skip
    for other in others:
        saved.assert_refused(signed(saved, document_of(saved), other), what=str(other)[:40])


@pytest.mark.parametrize("depth", [50, 200, 900, 5000])
def test_a_deep_tree_of_optimizers_is_refused(saved: Saved, depth: int) -> None:
    document = document_of(saved)
    head, tail = '{"kind":"accumulate","every":2,"micro_step":0,"sums":{},"optimizer":', "}"
    inner = json.dumps(document["optimizer"]["optimizer"])
    text = json.dumps({**document, "optimizer": "HERE"}).replace('"HERE"', head * depth + inner + tail * depth)
    assert not complaint(saved, f"{depth} rounds", signed(saved, text))
    route = '{"kind":"multi","step":1,"options":{},"routes":[{"filter":null,"optimizer":'
    text = json.dumps({**document, "optimizer": "HERE"}).replace('"HERE"', route * depth + inner + "}]}" * depth)
    assert not complaint(saved, f"{depth} trees", signed(saved, text))


def test_a_later_format_says_so(saved: Saved) -> None:
    later = {**document_of(saved), "format": 2, "gradstep": "99.0"}
    saved.assert_refused(signed(saved, later))
    with pytest.raises(gs.CheckpointError, match=r"format 2.*99\.0.*update"):
        gs.load(saved.path)


# What is no file of bytes


def test_what_is_no_regular_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    (tmp_path / "null.safetensors").symlink_to("/dev/null")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    opt = gs.Adam(0.1)
    before = everything(opt)
    for name in ("fifo", "folder", "empty", "zero", "null", "sparse"):
        for load in (gs.load, opt.load):
            with pytest.raises(gs.CheckpointError, match=name):
                load(tmp_path / f"{name}.safetensors")
    for name in ("gone", "never"):
        with pytest.raises(FileNotFoundError):
            gs.load(tmp_path / f"{name}.safetensors")
    assert everything(opt) == before


LITTLE = """
import json, resource, struct, sys
import gradstep as gs
gs.SGD(0.1).save(sys.argv[1] + ".warm")
gs.load(sys.argv[1] + ".warm")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), resource.RLIM_INFINITY))
errors = []
entry = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}
for length, text, size in [
    (1 << 40, b"{}", 100), (1 << 40, b"{}", 1 << 41), (100_000_000, b"", 1 << 41), (100_000_001, b"", 1 << 41),
    (0, b"", 1 << 41), (None, json.dumps({"w": entry}).encode(), 1 << 40), (None, b"[" * 10_000_000, None),
    (None, b'{"a":' + b"1" * 10_000_000, None),
    (None, b'{"__metadata__":{"gradstep":"' + b"[" * 10_000_000 + b'"}}', None),
]:
    with open(sys.argv[1], "wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        if size:
            file.truncate(size + 8 + len(text) * (length is None))
    try:
        gs.load(sys.argv[1])
    except gs.CheckpointError as error:
        errors.append(str(error)[:200])
print(json.dumps(errors))
"""


def test_files_that_claim_terabytes_are_refused_in_little_memory(tmp_path: Path) -> None:
    assert len(answer(LITTLE, tmp_path / "a.safetensors")) == 9


def test_gradients_and_steps_still_work_after_a_refusal(saved: Saved) -> None:
    saved.assert_refused(saved.whole[:-1])
    twin, others = make(), few(5)
    twin.apply_gradients(few(6), others)
    for seed in range(7, 12):
        saved.opt.apply_gradients(few(seed), saved.params)
        twin.apply_gradients(few(seed), others)
    assert everything(twin) == everything(saved.opt)
    assert bits_of(others) == bits_of(saved.params)
    assert np.isfinite(others["b"]).all()
