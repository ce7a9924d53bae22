"""Pages that only the site has: the README as home, notebooks, results, modules. Paths are those of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import notebooks
import results
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
NOTEBOOKS, RESULTS, BENCHMARKS = "experiments/notebooks", "experiments/results", "experiments/benchmarks/results"
RUN = "build/notebooks"  # where .ci/run keeps what it ran
SHOWN_AS_IS = ("png", "svg", "json")
ROOMS = {  # page: title, folder, modules to begin with; of the package itself only these, of a room all that are public
    "load": ("Loading models", "emocircuits/models", "load anatomy"),
    "activations": ("Reading and writing activations", "emocircuits/activations", "sites capture edit edits control"),
    "directions": ("Directions", "emocircuits", "directions quality reading examples generation"),
    "circuits": ("Circuits", "emocircuits/circuits", "units heads neurons assemble validate modulation"),
    "steering": ("Steering", "emocircuits/steering", "steerer term controls meter"),
    "multimodal": ("Modalities", "emocircuits/multimodal", "balance shared"),
    "reasoning": ("Reasoning", "emocircuits/reasoning", "steps traces engines sweep importance"),
    "evaluation": ("Evaluation", "emocircuits/evaluation", "judges expression fluency statistics"),
    "saes": ("Step SAEs", "saes", "collect train features steering"),
    "data": ("Scenarios and emotions", "emocircuits/data", "scenarios emotions prompts"),
}
SECTIONS = {"cards": "Cost cards", "nano_mllm": "Modality balance", "reasoning": "Reasoning", "saes": "Step SAEs"}
INDEX = {
    NOTEBOOKS: "# Notebooks\n\nEach runs on two CPU cores; `TOUR_SCENARIOS` makes it smaller or larger.\n\n",
    RESULTS: "# Results\n\nEvery number comes from a file in `experiments/results/`, read when the site was built.\n\n",
    "api": "# API\n\nWhat the docstrings say, module by module.\n\n",
}
DRAWING, STYLE = re.compile(r'<img[^>]*src="([^"/]+\.svg)"[^>]*>'), re.compile(r"<style>.*?</style>", re.DOTALL)
LINK = re.compile(r"(\]\()((?:\.\./)?(?:docs|experiments)/[^)\s]+)(\))")


def on_config(config: Any) -> Any:
    """Fill the sections of the navigation that are left empty; a guide not named there comes before the last."""
    sections = {next(iter(entry)): entry for entry in config.nav}
    for title, folder in (("Tour", NOTEBOOKS), ("Results", RESULTS), ("API", "api")):
        groups: dict[str, list[str]] = {}
        for uri in generated():
            if uri.startswith(f"{folder}/"):
                inner = uri.removeprefix(f"{folder}/")
                groups.setdefault(inner.split("/")[0] if "/" in inner else "", []).append(uri)
        pages: list[Any] = groups.pop("")
        pages += [group[0] if len(group) == 1 else {SECTIONS.get(name, name): group} for name, group in groups.items()]
        sections[title][title] = pages
    listed = re.findall(r"[\w/]+\.md", str(config.nav))
    sections["Guides"]["Guides"][-1:-1] = sorted(p.name for p in (ROOT / "docs").glob("*.md") if p.name not in listed)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the pictures and tables that pages link to."""
    pages = generated()
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    if any(notebooks.PLOTLY in content for content in pages.values()):  # four megabytes, for figures of notebooks only
        files.append(File.generated(config, notebooks.PLOTLY, content=notebooks.plotly()))
    for folder in (NOTEBOOKS, RESULTS, BENCHMARKS):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix[1:] in (*SHOWN_AS_IS, "ipynb"):
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that are right in the repository, made right on the site."""
    here = page.file.src_uri
    return markdown if "/" in here else LINK.sub(lambda m: m[1] + _link(m[2]) + m[3], markdown)


def _link(target: str) -> str:
    target = target.removeprefix("../").removeprefix("docs/")
    if target.startswith(f"{NOTEBOOKS}/") and target.endswith(".ipynb"):
        return target.removesuffix("ipynb") + "md"
    return f"{target}index.md" if target.endswith("/") else target


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put drawings of our own into the page, where they follow its light or dark theme."""
    folder = Path(page.file.abs_src_path or "").parent
    if folder.name != "concepts":
        return html
    return DRAWING.sub(lambda m: STYLE.sub("", (folder / m[1]).read_text("utf-8")), html)


def generated() -> dict[str, str]:
    """All generated pages, path -> Markdown."""
    tours = sorted((ROOT / NOTEBOOKS).glob("*.ipynb"))
    toured = {f"{NOTEBOOKS}/{p.stem}.md": notebooks.page(p, ROOT / RUN / p.name) for p in tours}
    found = {f"{RESULTS}/{name}": text for name, text in results.pages(ROOT / RESULTS).items()}
    api = {f"api/{page}.md": _room(*room) for page, room in ROOMS.items()}
    cpu = {f"{BENCHMARKS}/cpu.md": (ROOT / BENCHMARKS / "cpu.md").read_text("utf-8")}
    home = {"index.md": "---\nhide: [navigation]\n---\n" + (ROOT / "README.md").read_text("utf-8")}
    indexed = {}
    for folder, pages in ((NOTEBOOKS, toured), (RESULTS, found), ("api", api)):
        lines = [f"- [{_title(text)}]({uri.removeprefix(f'{folder}/')})" for uri, text in pages.items()]
        indexed |= {f"{folder}/index.md": INDEX[folder] + "\n".join(lines) + "\n", **pages}
    return {**home, **indexed, **cpu}


def _title(markdown: str) -> str:
    return next((line.removeprefix("# ") for line in markdown.splitlines() if line.startswith("# ")), "Untitled")


def _room(title: str, folder: str, first: str) -> str:
    """One directive for every public module of a room."""
    names = first.split()
    if folder != "emocircuits":
        public = (p.stem for p in sorted((ROOT / folder).glob("*.py")) if not p.stem.startswith("_"))
        names += [name for name in public if name not in names]
    room = folder.replace("/", ".")
    return f"# {title}\n\n" + "\n\n".join(f"::: {room}.{name}" for name in names) + "\n"
