"""A bundle: the folder that export writes and every engine reads. Reading it, with every check of `docs/bundle.md`.

A bundle is untrusted input. `Bundle.open` returns only when the whole folder has been checked, in this order: the
folder, the manifest (size, JSON, schema version, types, ranges, references), the kind and size of every file, the
sha256 of every file, and last the graphs (external data, interface, patches and blocks). That a bundle's graphs passed
is kept between runs, in a folder that only the user can write: reading them takes longer than all the rest of opening a
small bundle. Writing is in `writer.py`.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ..cache_folder import Facts, code_key
from ..errors import BundleError, EngineError, quote
from .files import file_size, open_regular, read_up_to, sha256_hex
from .geometry import DENOISER, check_geometry, facts
from .graph_file import MAX_GRAPH_BYTES, check_graph, parse_graph
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileInfo, GraphInfo, Manifest, parse_manifest


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. Make one with `Bundle.open`, not with the constructor.

    What was checked holds as long as nobody writes into the folder: data files are mapped by the engine later, by name.
    Keep the folder unwritable for people you do not trust, as you would a program.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Checks everything in `folder` (reading every byte once, for the sha256) and returns the bundle.

        The folder and its files may be links: the content is what is promised. Files in the folder that the manifest
        does not list are never opened. Raises BundleError.
        """
        folder = _existing_folder(folder)
        with open_regular(folder, MANIFEST_NAME, follow=True) as file:
            where = str(folder / MANIFEST_NAME)
            if file_size(file) > MAX_MANIFEST_BYTES:
                raise BundleError(
                    f"{where} is {format_size(file_size(file))}, more than the {format_size(MAX_MANIFEST_BYTES)} that "
                    "a manifest may have: this is another file. Copy the bundle anew, or make it again with tmd-export."
                )
            written = read_up_to(file, MAX_MANIFEST_BYTES + 1)
            manifest = parse_manifest(written, where)

        graph_of = {info.file: info for info in manifest.graphs.values()}
        name_of = {info.file: name for name, info in manifest.graphs.items()}
        with ExitStack() as stack:
            # All kinds and sizes first: an incomplete copy is found at once, not after hashing gigabytes.
            opened = {}
            for name, stated in manifest.files.items():
                opened[name] = stack.enter_context(open_regular(folder, name, follow=True))
                _check_size(opened[name], stated, folder / name, is_graph=name in graph_of)
            contents = {}
            for name, file in opened.items():
                contents[name] = _check_content(file, manifest.files[name], folder / name, keep=name in graph_of)

        # The manifest names the sha256 of every file, so what was found of these graphs stays true.
        verdict = _verdict_key(written)
        if verdict is None or _FACTS.read().get(verdict) is not True:
            known = {}
            for name, info in graph_of.items():
                where = str(folder / name)
                data_size = manifest.files[info.data].size if info.data else 0
                model = parse_graph(contents.pop(name), where)
                check_graph(model, info, data_size, where)
                if name_of[name] in DENOISER:
                    known[name_of[name]] = facts(model, info)
            check_geometry(manifest, known, str(folder / MANIFEST_NAME))
            if verdict is not None:
                _FACTS.add({verdict: True})
        return cls(folder, manifest)

    def graph_path(self, graph: str) -> Path:
        """Path of the graph's ONNX file. Raises EngineError if the bundle has no such graph."""
        return self.folder / self.graph_info(graph).file

    def read_graph(self, graph: str) -> bytes:
        """The graph's ONNX file, with the sha256 checked again on these very bytes. Raises BundleError, EngineError."""
        return self._read(self.graph_info(graph).file, is_graph=True)

    def read_tokenizer(self) -> bytes | None:
        """The file of `text.tokenizer`, checked in the same way; None: there is none. Raises BundleError."""
        name = self.manifest.text.tokenizer
        return None if name is None else self._read(name)

    def _read(self, name: str, is_graph: bool = False) -> bytes:
        stated = self.manifest.files[name]
        with open_regular(self.folder, name, follow=True) as file:
            _check_size(file, stated, self.folder / name, is_graph)
            return _check_content(file, stated, self.folder / name, keep=True)

    def data_path(self, graph: str) -> Path | None:
        """Where the graph's data file really is, links resolved; None: it has none. Raises EngineError."""
        data = self.graph_info(graph).data
        return None if data is None else Path(os.path.realpath(self.folder / data))

    def data_is_as_stated(self, graph: str) -> bool:
        """Whether the graph's data file, if it has one, still has the content that the manifest states.

        Engines map that file by its name, long after `open` checked it. What is made of it may be kept under the sha256
        of the manifest only if this is true.
        """
        data = self.graph_info(graph).data
        if data is None:
            return True
        stated = self.manifest.files[data]
        try:
            with open_regular(self.folder, data, follow=True) as file:
                _check_size(file, stated, self.folder / data, is_graph=False)
                _check_content(file, stated, self.folder / data, keep=False)
        except (BundleError, OSError):
            return False
        return True

    def graph_info(self, graph: str) -> GraphInfo:
        """What the manifest says of a graph. Raises EngineError if the bundle has no such graph."""
        if graph not in self.manifest.graphs:
            present = ", ".join(sorted(self.manifest.graphs))
            raise EngineError(
                f"The bundle {self.folder} has no graph {quote(graph)}, only {present}. "
                "It was exported without that part: export it again with that graph among --parts."
            )
        return self.manifest.graphs[graph]


_FACTS = Facts("bundles.json")


def _verdict_key(manifest: bytes) -> str | None:
    """Names the checks of the graphs of such a bundle, as this version of them is; None: it cannot be told."""
    here = Path(__file__).parent
    code = code_key(*sorted(here.glob("*.py")), *sorted(here.glob("families/*.py")))
    return None if code is None else f"graphs {hashlib.sha256(code.encode() + manifest).hexdigest()}"


def format_size(count: int) -> str:
    """Bytes for people, decimal units: "22.1 MB"."""
    size = float(count)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _existing_folder(folder: str | Path) -> Path:
    try:
        resolved = Path(folder).resolve(strict=True)
    except FileNotFoundError:
        raise BundleError(
            f"{folder} does not exist: a bundle is a folder made by tmd-export. Check the path."
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(
            f"{quote(str(folder))} cannot be opened: {error}. Check the path and its permissions."
        ) from None
    if not resolved.is_dir():
        raise BundleError(f"{folder} is a file, and a bundle is a folder with a {MANIFEST_NAME}. Give the folder.")
    return resolved


def _check_size(file: FileIO, stated: FileInfo, path: Path, is_graph: bool) -> None:
    size = file_size(file)
    if size != stated.size:
        have, expected = format_size(size), format_size(stated.size)
        if have == expected:
            have, expected = f"{size} bytes", f"{stated.size} bytes"
        cause = "the copy is incomplete" if size < stated.size else "the file was changed or replaced"
        raise BundleError(
            f"{path} is {have}, the manifest says {expected}: {cause}. "
            "Copy the bundle again, or make it again with tmd-export."
        )
    if is_graph and size > MAX_GRAPH_BYTES:
        raise BundleError(
            f"{path} is {format_size(size)}, more than the {format_size(MAX_GRAPH_BYTES)} that a graph may have: "
            "weights belong into its data file. Export the bundle again."
        )


def _check_content(file: FileIO, stated: FileInfo, path: Path, keep: bool) -> bytes:
    """Compares the sha256; returns the content if `keep`, so that what is parsed is what was checked, else b""."""
    try:
        content = read_up_to(file, stated.size + 1) if keep else b""
        digest = hashlib.sha256(content).hexdigest() if keep else sha256_hex(file)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}. Check the disk, or copy the bundle again.") from None
    if digest != stated.sha256:
        raise BundleError(
            f"{path} has the right size but another sha256 than the manifest says: it is damaged or was exchanged. "
            "Copy the bundle again, or make it again with tmd-export."
        )
    return content
