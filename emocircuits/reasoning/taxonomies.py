"""What a sentence does in a chain of thought: sets of categories as data, with the papers they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..errors import InputError


class Tag(NamedTuple):
    """One category: its name, a short form for tables and plots, and what a sentence of it does."""

    name: str
    short: str
    meaning: str


@dataclass(frozen=True)
class Taxonomy:
    """A named set of categories. Raises InputError for fewer than two, or for names and short forms that collide."""

    name: str
    tags: tuple[Tag, ...]

    def __post_init__(self) -> None:
        if len(self.tags) < 2:
            raise InputError(f"the taxonomy {self.name} needs at least two tags")
        given = [_fold(word) for tag in self.tags for word in {tag.name, tag.short}]
        if twice := next((word for word in given if given.count(word) > 1), None):
            raise InputError(f"the taxonomy {self.name} uses {twice!r} twice; names and short forms must differ")

    @property
    def names(self) -> tuple[str, ...]:
        """The categories' names in order."""
        return tuple(tag.name for tag in self.tags)

    def find(self, word: object) -> str | None:
        """The category that a name or short form means, in any case, with spaces or hyphens; None for any other."""
        return self._known.get(_fold(word)) if isinstance(word, str) else None

    @cached_property
    def _known(self) -> dict[str, str]:
        return {_fold(word): tag.name for tag in self.tags for word in (tag.name, tag.short)}


def _fold(word: str) -> str:
    return "_".join(word.casefold().replace("-", " ").replace("_", " ").split())


def _taxonomy(name: str, tags: Iterable[tuple[str, str, str]]) -> Taxonomy:
    return Taxonomy(name, tuple(Tag(*tag) for tag in tags))


THOUGHT_ANCHORS = _taxonomy(
    "thought_anchors",
    [
        ("problem_setup", "PS", "reads, restates or parses the task"),
        ("plan_generation", "PG", "states or chooses a plan, or reasons about what to do next"),
        ("fact_retrieval", "FR", "recalls a fact, a formula or a given detail without computing"),
        ("active_computation", "AC", "calculates, manipulates or infers something toward the answer"),
        ("uncertainty_management", "UM", "voices confusion, re-evaluates, weighs alternatives or backtracks"),
        ("result_consolidation", "RC", "gathers intermediate results, summarises or prepares the answer"),
        ("self_checking", "SC", "verifies an earlier step"),
        ("final_answer_emission", "FAE", "states the final answer"),
    ],
)
"""Thought Anchors (arXiv 2506.19143)."""

VENHOFF = _taxonomy(
    "venhoff",
    [
        ("initializing", "IN", "opens the task: rephrases it or says how to begin"),
        ("deduction", "DE", "draws a conclusion from what is already there"),
        ("adding-knowledge", "AK", "brings in knowledge from outside the task"),
        ("example-testing", "ET", "tries an example, a case or a scenario"),
        ("uncertainty-estimation", "UE", "says how sure or unsure it is"),
        ("backtracking", "BT", "drops the present approach for another one"),
    ],
)
"""Understanding Reasoning in Thinking Language Models via Steering Vectors (Venhoff et al., arXiv 2506.18167)."""

BASE_MODELS = _taxonomy(
    "base_models",
    [
        ("framing", "FR", "says what the problem is about and what is asked"),
        ("metacognitive_setup", "MS", "reflects on how to think about the problem before doing so"),
        ("stepwise_calculation", "SC", "carries out one step of a calculation or derivation"),
        ("alternatives", "AL", "considers another approach, reading or possibility"),
        ("information_seeking", "IS", "asks for, looks up or recalls what is needed"),
        ("consequence_projection", "CP", "works out what would follow if something held"),
        ("conclusion", "CO", "states a result or the final answer"),
    ],
)
"""Base Models Know How to Reason (arXiv 2510.07364)."""

APPRAISAL = _taxonomy(
    "appraisal",
    [
        ("situation", "SI", "says what happened or what is the case"),
        ("goal", "GO", "says what the person wants, values or has at stake"),
        ("expectation", "EX", "says how expected, sudden or certain it is for the person"),
        ("cause", "CA", "says who or what brought it about, and whether on purpose"),
        ("control", "CO", "says what can still be changed, done or averted"),
        ("norm", "NO", "measures it against what is fair, decent, clean or usual"),
        ("feeling", "FE", "describes bodily signs, behaviour or urges"),
        ("alternative", "AL", "weighs or rules out another emotion"),
        ("conclusion", "CN", "names the emotion that is felt"),
    ],
)
"""Our own, for reasoning about emotions: the appraisals of Smith & Ellsworth (1985) and Scherer (2001)."""

CONVERSATION = _taxonomy(
    "conversation",
    [
        ("question_answering", "QA", "asks itself a question and then answers it"),
        ("perspective_shift", "PS", "turns to another viewpoint, approach or assumption"),
        ("conflict_of_perspectives", "CP", "sets one view against another that contradicts it"),
        ("reconciliation", "RE", "brings views that disagreed together into one"),
    ],
)
"""Conversational behaviours of reasoning: societies of thought (arXiv 2601.10825)."""

BALES = _taxonomy(
    "bales",
    [
        ("ask_orientation", "AO", "asks for facts, for what is given, or to have something repeated or made clear"),
        ("ask_opinion", "AP", "asks for a judgement, an analysis or how something is felt about"),
        ("ask_suggestion", "AS", "asks what could be done or which way to go"),
        ("give_orientation", "GO", "gives facts, repeats or clarifies what is given"),
        ("give_opinion", "GP", "gives a judgement, an analysis or a wish"),
        ("give_suggestion", "GS", "proposes what to do or which way to go"),
        ("solidarity", "SO", "praises, helps or encourages"),
        ("tension_release", "TR", "jokes, laughs or shows relief or satisfaction"),
        ("agree", "AG", "accepts or concurs with what was said"),
        ("disagree", "DI", "rejects or doubts what was said"),
        ("tension", "TE", "shows strain, worry or helplessness, or gives up for now"),
        ("antagonism", "AN", "attacks, belittles or blames, or defends itself"),
    ],
)
"""Roles in a group's interaction (Bales, 1950), as arXiv 2601.10825 counts them in reasoning."""

COGNITION = _taxonomy(
    "cognition",
    [
        ("verification", "VE", "checks a result or a step that is there already"),
        ("backtracking", "BA", "gives up a line of thought as wrong and goes back to take another"),
        ("subgoal_setting", "SU", "breaks the problem into smaller ones to be reached in turn"),
        ("backward_chaining", "BC", "starts from the wanted result and asks what it would need"),
    ],
)
"""Cognitive behaviours of reasoning (arXiv 2601.10825)."""
