"""Clips whose face and voice disagree: one schema, readers of local copies of public sets, and scores with intervals.

CA-MER's structure (arXiv 2508.01181): in "video-aligned" clips the video alone carries the true emotion, in
"audio-aligned" the audio alone, in "consistent" all modalities do. Nothing is downloaded and no data comes along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.loaders import read_rows
from ..errors import InputError, unknown
from ..evaluation.statistics import Interval, clustered_bootstrap

SUBSETS = ("video-aligned", "audio-aligned", "consistent")
RAVDESS_EMOTIONS = ("neutral", "calm", "happiness", "sadness", "anger", "fear", "disgust", "surprise")
DFEW_EMOTIONS = ("happiness", "sadness", "neutral", "anger", "surprise", "disgust", "fear")


@dataclass(frozen=True)
class Clip:
    """One clip: `labels` are its true emotions, `heard` and `shown` what voice and face alone say (None: unknown).

    subset: one of `SUBSETS`, or None. cluster: what clips share that are not independent, such as the speaker.
    """

    id: str
    labels: tuple[str, ...]
    video: Path | None = None
    audio: Path | None = None
    subset: str | None = None
    heard: str | None = None
    shown: str | None = None
    cluster: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.subset is not None and self.subset not in SUBSETS:
            raise unknown("subset", self.subset, SUBSETS)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about a clip: task, options, and the right one."""

    clip: str
    task: str
    question: str
    options: tuple[str, ...]
    answer: str


# ---------------------------------------------------------------- readers


def load_table(path: str | Path, columns: Mapping[str, str], root: str | Path | None = None) -> list[Clip]:
    """Clips of a CSV, TSV or JSONL table; columns: {field of `Clip`: name of the column}, id and labels at least.

    Labels may be several, separated by commas; media paths are taken from `root` (default: the table's folder).
    Raises InputError for missing columns, unknown subsets, or ids that appear twice.
    """
    path = Path(path).expanduser()
    folder = path.parent if root is None else Path(root).expanduser()
    for needed in ("id", "labels"):
        if needed not in columns:
            raise InputError(f"`columns` must say which column holds {needed!r}")
    clips: dict[str, Clip] = {}
    for line, row in read_rows(path):
        for name in columns.values():
            if name not in row:
                raise InputError(f"{path}, line {line}: {unknown('column', name, row)}")
        cells = {f: str(row[name]).strip() for f, name in columns.items() if str(row[name] or "").strip()}
        extra = {k: v for k, v in row.items() if k not in columns.values()}
        labels = tuple(x.strip().lower() for x in cells.pop("labels", "").strip("[]").replace("'", "").split(","))
        if not labels[0]:
            raise InputError(f"{path}, line {line}: no label; fill it or delete the row")
        media: dict[str, Any] = {kind: folder / cells.pop(kind) for kind in ("video", "audio") if kind in cells}
        clip = Clip(**cells, **media, labels=labels, extra=extra)  # type: ignore[arg-type]
        if clip.id in clips:
            raise InputError(f"{path}, line {line}: clip {clip.id!r} is there twice")
        clips[clip.id] = clip
    return list(clips.values())


def load_ca_mer(folder: str | Path, columns: Mapping[str, str] | None = None) -> list[Clip]:
    """CA-MER: `<folder>/<subset>.csv` for the three subsets, columns name and openset, media in `<folder>/video`.

    The published layout was not open to us: give `columns` (as for `load_table`) where your copy differs. Raises
    InputError when a subset's table is missing.
    """
    folder = Path(folder).expanduser()
    tables = {s: next(iter(sorted(folder.glob(f"{s.replace('-', '?')}*.csv"))), None) for s in SUBSETS}
    if missing := [s for s, table in tables.items() if table is None]:
        raise InputError(f"{folder} holds no table {missing[0]}.csv; CA-MER has one for each of {', '.join(SUBSETS)}")
    made = []
    for subset, table in tables.items():
        assert table is not None
        for clip in load_table(table, columns or {"id": "name", "labels": "openset"}, folder):
            video = clip.video or folder / "video" / f"{clip.id}.mp4"
            made.append(Clip(clip.id, clip.labels, video, clip.audio, subset, clip.heard, clip.shown,
                             clip.cluster or clip.id, clip.extra))  # fmt: skip
    return made


def load_mer(folder: str | Path, table: str = "gt.csv", columns: Mapping[str, str] | None = None) -> list[Clip]:
    """EMER and MER2023: a table with name and openset (or discrete) labels, media in `<folder>/video/<name>.mp4`.

    Raises InputError for a missing table or other columns (give `columns` then).
    """
    folder = Path(folder).expanduser()
    path = folder / table
    if columns is None:
        head = next(iter(read_rows(path)))[1]
        label = next((c for c in ("openset", "discrete", "emotion", "label") if c in head), None)
        if label is None or "name" not in head:
            raise InputError(f"{path} has columns {', '.join(head)}; say with `columns` which are id and labels")
        columns = {"id": "name", "labels": label}
    clips = load_table(path, columns, folder)
    return [Clip(c.id, c.labels, c.video or folder / "video" / f"{c.id}.mp4", c.audio, cluster=c.cluster or c.id,
                 extra=c.extra) for c in clips]  # fmt: skip


def load_dfew(folder: str | Path, split: str = "test", fold: int = 1) -> list[Clip]:
    """DFEW: `EmoLabel_DataSplit/<split>(single-labeled)/set_<fold>.csv`, clips in `Clip/original`, labels 1 to 7.

    Raises InputError for a missing table, or a label outside 1 to 7.
    """
    folder = Path(folder).expanduser()
    path = folder / "EmoLabel_DataSplit" / f"{split}(single-labeled)" / f"set_{fold}.csv"
    made = []
    for clip in load_table(path, {"id": "video_name", "labels": "label"}, folder):
        if clip.labels[0] not in set("1234567"):
            raise InputError(f"{path}: label {clip.labels[0]!r} of clip {clip.id} is not one of 1 to 7")
        label = DFEW_EMOTIONS[int(clip.labels[0]) - 1]
        video = folder / "Clip" / "original" / f"{clip.id}.mp4"
        made.append(Clip(clip.id, (label,), video, cluster=clip.id))
    return made


def load_ravdess(folder: str | Path) -> list[Clip]:
    """RAVDESS speech: files named modality-channel-emotion-intensity-statement-repetition-actor, anywhere below.

    Raises InputError when no file has such a name.
    """
    made = []
    for path in sorted(Path(folder).expanduser().rglob("*-*-*-*-*-*-*.*")):
        parts = path.stem.split("-")
        if len(parts) != 7 or not all(len(p) == 2 and p.isdigit() for p in parts) or not 1 <= int(parts[2]) <= 8:
            continue
        emotion, silent = RAVDESS_EMOTIONS[int(parts[2]) - 1], parts[0] == "02"
        video, audio = (path if parts[0] != "03" else None), (None if silent else path)
        extra = {"statement": parts[4], "intensity": parts[3], "repetition": parts[5]}
        heard, shown = (None if silent else emotion), (None if parts[0] == "03" else emotion)
        made.append(Clip(path.stem, (emotion,), video, audio, None, heard, shown, f"actor {parts[6]}", extra))
    if not made:
        raise InputError(f"{folder} holds no file with a RAVDESS name such as 01-01-03-01-01-01-12.mp4")
    return made


def crossed(clips: Sequence[Clip], seed: int = 0) -> list[Clip]:
    """Conflict clips from pairs by the same speaker: the face of one with the voice of another emotion's.

    Nothing true carries over, so `labels` holds both readings, and `heard` and `shown` say which is whose. Clips are
    used once on each side where possible. Raises InputError when no speaker has two emotions.
    """
    rng, made = np.random.default_rng(seed), []
    for cluster in sorted({c.cluster for c in clips}):
        mine = [c for c in clips if c.cluster == cluster]
        seen = [c for c in mine if c.video and c.shown]
        voices = [c for c in mine if c.audio and c.heard]
        voices = [voices[i] for i in rng.permutation(len(voices))]
        for face in seen:
            match = next((i for i, v in enumerate(voices) if v.heard != face.shown), None)
            if match is None:
                continue
            voice = voices.pop(match)
            assert face.shown
            assert voice.heard
            made.append(Clip(f"{face.id}+{voice.id}", (face.shown, voice.heard), face.video, voice.audio, None,
                             voice.heard, face.shown, cluster))  # fmt: skip
    if not made:
        raise InputError("no speaker has clips of two emotions, with face and voice, so nothing can be crossed")
    return made


def load_emorealm(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """EmoReAlM questions from JSONL, CSV or TSV: clip, task, question, options (a list or | between), answer.

    columns: {field of `Question`: name of the column} where yours differ. Raises InputError for missing columns, or an
    answer that is no option.
    """
    names = {n: n for n in ("clip", "task", "question", "options", "answer")} | dict(columns or {})
    made = []
    for line, row in read_rows(Path(path).expanduser()):
        for name in names.values():
            if name not in row:
                raise InputError(f"{path}, line {line}: {unknown('column', name, row)}")
        options = row[names["options"]]
        options = tuple(str(o).strip() for o in (options.split("|") if isinstance(options, str) else options))
        cells = {f: str(row[names[f]]).strip() for f in ("clip", "task", "question", "answer")}
        if cells["answer"] not in options:
            raise InputError(f"{path}, line {line}: the answer {cells['answer']!r} is not among the options")
        made.append(Question(**cells, options=options))
    return made


# ---------------------------------------------------------------- scores


def subset_accuracy(clips: Sequence[Clip], answers: Sequence[str | None], seed: int = 0) -> dict[str, Interval]:
    """Accuracy on each subset that is there, and the preference gap, with intervals clustered by `Clip.cluster`.

    gap: audio-aligned minus video-aligned; above 0 the model trusts audio more. Read it beside "consistent": a gap also
    shrinks when the stronger modality is damaged. None (no answer) is wrong. Raises InputError for unequal lengths.
    """
    right = np.array([a is not None and a in c.labels for c, a in _paired(clips, answers)], dtype=float)
    clusters = [c.cluster or c.id for c in clips]
    subsets = np.array([c.subset or "" for c in clips])
    found = {}
    for subset in SUBSETS:
        here = subsets == subset
        if here.any():
            found[subset] = clustered_bootstrap(right[here], [c for c, h in zip(clusters, here) if h], seed=seed)
    if {"audio-aligned", "video-aligned"} <= set(found):
        table = np.stack([right, subsets == "audio-aligned", subsets == "video-aligned"], axis=1)
        found["gap"] = clustered_bootstrap(table, clusters, _gap, seed=seed)
    return found


def _gap(rows: np.ndarray) -> float:
    right, heard, shown = rows.T.astype(float)
    if not heard.sum() or not shown.sum():
        return float("nan")
    return float((right * heard).sum() / heard.sum() - (right * shown).sum() / shown.sum())


def preference(clips: Sequence[Clip], answers: Sequence[str | None], seed: int = 0) -> dict[str, Interval]:
    """On clips whose voice and face disagree: how often the answer is the voice's, the face's, neither, and the gap.

    Raises InputError when no clip disagrees.
    """
    pairs = [(c, a) for c, a in _paired(clips, answers) if c.heard and c.shown and c.heard != c.shown]
    if not pairs:
        raise InputError("no clip has a voice and a face that disagree (`heard` and `shown`)")
    voice = np.array([a == c.heard for c, a in pairs], dtype=float)
    face = np.array([a == c.shown for c, a in pairs], dtype=float)
    clusters = [c.cluster or c.id for c, _ in pairs]
    parts = {"voice": voice, "face": face, "neither": 1 - voice - face, "gap": voice - face}
    return {name: clustered_bootstrap(values, clusters, seed=seed) for name, values in parts.items()}


def set_scores(
    truth: Sequence[Iterable[str]], predicted: Sequence[Iterable[str]], groups: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """{"precision", "recall", "mean"} [n] of open-vocabulary label sets, synonyms folded by {word: group}.

    The published "accuracy" of such sets is this precision. An empty prediction scores 0 for both; an empty truth NaN.
    """
    fold = lambda words: {(groups or {}).get(w.strip().lower(), w.strip().lower()) for w in words}  # noqa: E731
    scores = []
    for true, said in zip(truth, predicted, strict=True):
        t, p = fold(true), fold(said)
        if not t:
            scores.append((np.nan, np.nan))
            continue
        scores.append((len(t & p) / len(p) if p else 0.0, len(t & p) / len(t)))
    precision, recall = np.array(scores).reshape(-1, 2).T
    return {"precision": precision, "recall": recall, "mean": (precision + recall) / 2}


def yes_no_rates(truth: Sequence[bool], said: Sequence[bool | None]) -> dict[str, float]:
    """Accuracy, recall of both classes and their harmonic mean, precision and F1 of "yes", and how often "yes" is said.

    The published "F1" of hallucination questions is the harmonic mean of the two recalls. None (no answer) is wrong.
    Undefined rates are NaN.
    """
    if len(truth) != len(said):
        raise InputError(f"{len(said)} answers were given to {len(truth)} questions")
    t = np.array(truth, dtype=bool)
    yes, no = np.array([s is True for s in said]), np.array([s is False for s in said])
    over = lambda a, b: float(a / b) if b else float("nan")  # noqa: E731
    hit = (t & yes).sum()
    yes_recall, no_recall, precision = over(hit, t.sum()), over((~t & no).sum(), (~t).sum()), over(hit, yes.sum())
    harmonic = over(2 * yes_recall * no_recall, yes_recall + no_recall)
    return {
        "accuracy": over(hit + (~t & no).sum(), len(t)), "yes_recall": yes_recall, "no_recall": no_recall,
        "harmonic_recall": harmonic, "yes_precision": precision,
        "yes_f1": over(2 * precision * yes_recall, precision + yes_recall), "yes_rate": over(yes.sum(), len(t)),
    }  # fmt: skip


def _paired(clips: Sequence[Clip], answers: Sequence[str | None]) -> list[tuple[Clip, str | None]]:
    if len(clips) != len(answers):
        raise InputError(f"{len(answers)} answers were given to {len(clips)} clips")
    return list(zip(clips, answers))
