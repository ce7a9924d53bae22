"""Which runs there are, what each holds, and what to say about it. No Streamlit in here."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from emocircuits import artefact
from emocircuits.artefact import read_json
from emocircuits.errors import InputError
from emocircuits.report import RunData, read_run

MANIFEST, BALANCE, TESTBED, ANCHORS, SAE = "manifest.json", "balance.json", "nano_mllm.json", "anchors.json", "sae.json"
REALLOCATION, CONFIDENCE = "reallocation.json", "confidence.json"
RESULTS = {TESTBED: "modality", BALANCE: "modality", ANCHORS: "reasoning", SAE: "features", CONFIDENCE: "features",
           "circuits.json": "circuits"}  # fmt: skip
"""What the files of a finished study say that a folder is about."""
STUDIES = {"balance": "modality", "anchors": "reasoning", "sae": "features", "confidence": "features",
           "circuits": "circuits"}  # fmt: skip
"""The same of studies, which may have only begun."""
STAGES = {
    "quality": "the quality of the directions", "evaluation": "the scores on held-out scenarios",
    "dose": "the dose response", "texts": "the texts", "circuits": "the circuits",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder with runs in it; the first name is the one that was asked for."""

    root: Path
    names: tuple[str, ...]


def is_run(folder: Path) -> bool:
    """Whether the explorer can open a folder."""
    return any((folder / name).is_file() for name in (MANIFEST, *RESULTS) if name != "circuits.json")


def find(path: str | Path) -> Place:
    """The run at `path` with its neighbours, or all runs in that folder. Raises InputError when there are none."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"{folder} does not exist; make a run with `emocircuits demo --out {folder}`")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the run folder that holds it")
    folder = folder.resolve()
    root = folder.parent if is_run(folder) else folder
    names = sorted(f.name for f in root.iterdir() if f.is_dir() and is_run(f))
    if not names:
        raise InputError(
            f"{folder} is not a run folder (no {MANIFEST}) and holds none; make one with "
            f"`emocircuits demo --out {folder}`"
        )
    first = [folder.name] if root != folder else []
    return Place(root, (*first, *(n for n in names if n not in first)))


def kind(folder: Path) -> str:
    """What a folder holds: "run", "circuits" (that part of a run by itself), "modality", "reasoning" or "features"."""
    found = next((kind for name, kind in RESULTS.items() if (folder / name).is_file()), None)
    return found or STUDIES.get(studied(folder), "run")


def studied(folder: Path) -> str:
    """The study that a folder was begun for, by its settings, also where it has written no results yet."""
    try:
        settings = read_json(folder / MANIFEST)["settings"]
        known = "balance" if "batches" in settings else "circuits" if "demo" in settings else "demo"
        return str(settings.get("kind", known))
    except (InputError, KeyError, TypeError, AttributeError):
        return ""  # whoever opens it will be told


def of_kind(place: Place, wanted: str) -> list[str]:
    """Names of the runs that hold one kind of thing."""
    return [name for name in place.names if kind(place.root / name) == wanted]


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the files that pages read: another value means that the folder has changed."""
    files = [f for pattern in ("*.json", "*.jsonl", "circuits/*.json") for f in sorted(folder.glob(pattern))]
    return tuple((str(f.relative_to(folder)), (s := f.stat()).st_mtime_ns, s.st_size) for f in files)


def open_run(folder: Path) -> RunData:
    """What a folder holds; results without a manifest count as a run of which only their own page can say something.

    Raises InputError for another folder or a damaged file.
    """
    if (folder / MANIFEST).is_file() or not is_run(folder):
        return read_run(folder)
    testbed = folder / TESTBED
    manifest = {"model": "the model is not recorded"}
    if testbed.is_file():
        manifest = {"model": "the test bed", **(read_json(testbed).get("manifest") or {})}
    nothing = dict.fromkeys(("quality", "embedding", "tuning", "evaluation", "dose", "texts"))
    return RunData(folder, {"settings": manifest, "stages": {}}, **nothing)


def notices(data: RunData) -> list[str]:
    """What a reader must know before reading a run: another version made it, or it has not finished."""
    said = []
    made, here = str(data.manifest.get("package_version", "unknown")), artefact.package_version()
    if "unknown" not in (made, here) and made.split(".")[:2] != here.split(".")[:2]:
        said.append(
            f"This run was made by emocircuits {made}, and this is {here}: what was measured may differ, and pages may "
            "lack parts."
        )
    missing = [words for name, words in STAGES.items() if getattr(data, name) is None]
    if kind(data.path) == "run" and missing:
        said.append(f"This run lacks {', '.join(missing)}. {how_to_finish(data)} makes what is missing.")
    return said


def how_to_finish(data: RunData) -> str:
    """The command that resumes a run (or makes the one a circuit folder belongs to), as text."""
    from emocircuits.demo import Plan

    settings = data.manifest.get("settings") or {}
    settings = settings.get("demo") or settings
    model, seed = str(settings.get("model", "demo")), settings.get("seed") or 0
    small = json.loads(json.dumps(asdict(Plan.small(model))))
    words = ["emocircuits", "demo", "--out", str(data.path)]
    words += ["--model", model] if model != "demo" else []
    words += ["--seed", str(seed)] if seed else []
    words += ["--small"] if settings == {**small, "seed": seed} else []
    return shlex.join(words)


def how_to_circuits(data: RunData) -> str:
    """The command that adds the full circuit study to a run, as text."""
    return how_to_finish(data).replace("emocircuits demo", "emocircuits circuit --full", 1).removesuffix(" --small")


def circuit_folder(data: RunData) -> Path:
    """Where a run keeps its circuits."""
    return data.path if kind(data.path) == "circuits" else data.path / "circuits"


def inside(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder; None for a name that leads out of it (names come from files, too)."""
    file = folder / name
    return file if file.parent == folder and file.name == name and name != ".." else None


def model_name(data: RunData) -> str:
    """What `emocircuits.load` takes to get the run's model; raises InputError when the run does not say."""
    settings = data.manifest.get("settings") or {}
    found = (settings.get("demo") or settings).get("model")
    if not isinstance(found, str) or not found:
        raise InputError("this run does not say which model it was made on, so the model cannot be loaded")
    return found
