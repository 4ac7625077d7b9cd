"""Skill-Mix's parts: skills, combinations, prompts, grades, scores and texts."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset

from headwater.corpora.skill_mix import (
    Combination,
    Grade,
    Grader,
    RuleGrader,
    RuleSpec,
    Skill,
    SkillMixPrompts,
    SkillSet,
    build_dataset,
    draw_combinations,
    grade_texts,
    score_texts,
    skill_mix_scores,
    write_texts,
)
from headwater.corpora.skill_mix_grades import names_skill
from headwater.corpora.skill_mix_skills import LISTED, read_topics, split_topics
from headwater.corpora.skill_mix_texts import SkillText, kept, write_table
from headwater.modalities.text.conversations import messages_of
from headwater.modalities.text.docs import CorpusError, read_documents
from headwater.modalities.text.generate import Generator, Message, Reply, Request, ScriptedGenerator

SKILLS = SkillSet(
    (
        Skill("irony", "rhetorical", "saying the opposite of what is meant", "How nice, rain again."),
        Skill("metaphor", "literary", "one thing called by the name of another"),
        Skill("modus ponens", "logic"),
    )
)
IRONY, METAPHOR, MODUS = SKILLS
PAIR = Combination((IRONY, METAPHOR), "bread baking")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def pool(size: int) -> list[Skill]:
    return [Skill(f"skill {i}") for i in range(size)]


class Recorded(Generator):
    """Keeps the requests that pass; those of some numbers fail."""

    def __init__(self, inner: Generator, fails: Sequence[int] = ()) -> None:
        self.inner, self.id, self.fails = inner, inner.id, fails
        self.requests: list[Request] = []

    def flow(self, requests: Iterator[Request | None]) -> Any:
        def passing() -> Iterator[Request | None]:
            for request in requests:
                if request is not None:
                    self.requests.append(request)
                yield request

        for done in self.inner.flow(passing()):
            if done is not None and done[0] in self.fails:
                yield done[0], Reply("", "error", 0, 0, None, False, "m", "the server is gone")
            else:
                yield done


def writer(**handlers: Any) -> ScriptedGenerator:
    def first(messages: Sequence[Message], _: random.Random) -> str:
        return "How nice, bread baking in the oven of the sky."

    def second(messages: Sequence[Message], _: random.Random) -> str:
        return f" {messages[1].content} Indeed. "

    return ScriptedGenerator({"write": first, "improve": second, **handlers})


def judge(answer: Any) -> ScriptedGenerator:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return ScriptedGenerator({"grade": lambda m, r: text})


FULL = {"skills": [True, True], "topic": True, "length": True, "sense": True}


# -- skills and topics


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".yaml"])
def test_property_skills_are_read_from_json_and_yaml_alike(tmp_path: Path, suffix: str) -> None:
    rows = [{"name": s.name, "category": s.category, "definition": s.definition, "example": s.example} for s in SKILLS]
    text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)  # JSON is YAML
    (tmp_path / f"skills{suffix}").write_text(text)
    assert SkillSet.load(tmp_path / f"skills{suffix}") == SKILLS
    assert SKILLS.categories == ("rhetorical", "literary", "logic")


def test_equation_a_split_by_category_keeps_the_order_and_loses_nothing() -> None:
    train, held_out = SKILLS.split(["literary", "rhetorical"])
    assert list(train) == [IRONY, METAPHOR]
    assert list(held_out) == [MODUS]
    everything, nothing = SKILLS.split(SKILLS.categories)
    assert (everything, len(nothing)) == (SKILLS, 0)
    with pytest.raises(ValueError, match="no skill is of the category 'physics'; there are rhetorical, lit"):
        SKILLS.split(["physics"])
    with pytest.raises(ValueError, match="no category is learned"):
        SKILLS.split([])


def test_rejects_a_skill_on_both_sides() -> None:
    with pytest.raises(ValueError, match="two skills are named 'Modus  PONENS', of the categories 'logic' and 'other'"):
        SkillSet((MODUS, Skill("Modus  PONENS", "other")))
    with pytest.raises(ValueError, match="must have a name"):
        Skill("  ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"category": "x"}]', "entry 1 of .* must be an object of texts with name"),
        ('[{"name": "a"}, {"name": "b", "level": "1"}]', "entry 2"),
        ('[{"name": 3}]', "entry 1"),
        ("[]", "at least one entry"),
        ('{"name": "a"}', "must hold a list"),
        ("{", "cannot be read"),
        ('[{"name": "a"}, {"name": "A"}]', "two skills are named"),
        (None, "cannot be read"),
    ],
)
def test_rejects_skill_files_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "skills.json").write_text(text)
    with pytest.raises(CorpusError, match=f"skills: .*{words}"):
        SkillSet.load(tmp_path / "skills.json")


def test_property_topics_come_from_lines_or_lists(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("bread  baking\n\nchess\n")
    (tmp_path / "t.yaml").write_text("- bread baking\n- chess\n")
    (tmp_path / "t.jsonl").write_text('"bread baking"\n"chess"\n')
    assert {read_topics(tmp_path / f"t.{suffix}") for suffix in ("txt", "yaml", "jsonl")} == {("bread baking", "chess")}
    (tmp_path / "twice.txt").write_text("chess\nChess\n")
    with pytest.raises(CorpusError, match="names a topic twice"):
        read_topics(tmp_path / "twice.txt")
    (tmp_path / "number.json").write_text("[3]")
    with pytest.raises(CorpusError, match=r"every entry of .* must be a text; got '3'"):
        read_topics(tmp_path / "number.json")


def test_property_topics_are_split_in_two_or_shared() -> None:
    topics = [f"t{i}" for i in range(10)]
    chosen, rest = split_topics(topics, 0.5, rng())
    assert sorted(chosen + rest) == topics
    assert len(chosen) == 5
    assert split_topics(topics, 1.0, rng()) == (topics, topics)
    assert split_topics(topics, 0.5, rng(1))[0] != chosen
    for share, words in ((0.01, "leaves one side of 10 topics empty"), (0.0, "share must be in")):
        with pytest.raises(ValueError, match=words):
            split_topics(topics, share, rng())


# -- combinations


def test_oracle_every_triple_comes_once_before_any_comes_again() -> None:
    skills, topics = pool(6), ["a", "b", "c"]
    drawn = draw_combinations(skills, topics, 3, 60, rng())
    everything = {frozenset(s.name for s in triple) for triple in itertools.combinations(skills, 3)}
    for turn in range(3):
        of = [c.key[0] for c in drawn[20 * turn : 20 * turn + 20]]
        assert len(of) == 20
        assert set(of) == everything
    assert len({c.key for c in drawn}) == 60, "with all topics each set of skills has come with each"
    assert draw_combinations(skills, topics, 3, 100, rng()) == drawn, "there are no more"
    assert draw_combinations(skills, topics, 3, 7, rng()) == drawn[:7]
    assert draw_combinations(skills, topics, 3, 7, rng(1)) != drawn[:7]


def test_property_many_subsets_are_drawn_without_a_list() -> None:
    drawn = draw_combinations(pool(60), ["a", "b"], 5, 400, rng())  # C(60, 5) = 5461512
    assert LISTED < 5_461_512
    assert len({c.key[0] for c in drawn}) == 400
    first = np.array([sum(s.name == "skill 0" for s in c.skills) for c in drawn]).mean()
    assert abs(first - 5 / 60) < 4 * np.sqrt(5 / 60 * 55 / 60 / 400)
    assert abs(np.mean([c.topic == "a" for c in drawn]) - 0.5) < 4 * 0.5 / np.sqrt(400)


def test_property_skills_stand_in_any_order_and_excluded_ones_in_none() -> None:
    skills = pool(4)
    drawn = draw_combinations(skills, ["a", "b"], 2, 12, rng())
    assert {c.skills[0].name < c.skills[1].name for c in drawn} == {True, False}
    turned = [Combination(c.skills[::-1], c.topic.upper()) for c in drawn[:5]]
    left = draw_combinations(skills, ["a", "b"], 2, 12, rng(1), exclude=turned)
    assert {c.key for c in left} == {c.key for c in drawn[5:]}


def test_degenerate_and_rejected_draws() -> None:
    assert draw_combinations(pool(3), ["a"], 2, 0, rng()) == []
    assert len(draw_combinations(pool(3), ["a"], 3, 9, rng())) == 1
    for k, n, topics, words in [
        (4, 1, ["a"], "k must be from 1 to 3, the skills in the pool; got 4"),
        (0, 1, ["a"], "k must be from 1 to 3"),
        (1, -1, ["a"], "n must be >= 0"),
        (1, 1, [], "topics must not be empty"),
    ]:
        with pytest.raises(ValueError, match=words):
            draw_combinations(pool(3), topics, k, n, rng())


# -- prompts


def test_property_the_prompt_shows_definitions_and_the_room_that_there_is() -> None:
    asked = SkillMixPrompts().message("write", PAIR).content
    assert "1. irony: saying the opposite of what is meant For example: How nice, rain again.\n2. metaphor" in asked
    assert "bread baking" in asked
    rooms = {k: Combination(tuple(pool(k)), "t").sentences for k in (1, 2, 3, 5)}
    assert rooms == {1: 1, 2: 1, 3: 2, 5: 4}
    assert "1 sentence," in asked
    assert "2 sentences," in SkillMixPrompts().message("write", Combination(tuple(SKILLS), "t")).content
    graded = SkillMixPrompts().message("grade", PAIR, "A {topic} {skills} text.").content
    assert "\nA {topic} {skills} text.\n" in graded, "what is graded stays as it is"
    assert '{"skills": [true or false for each of the 2 skills' in graded


def test_rejects_prompts_without_a_place_for_what_they_show(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text('write = "{names} / {topic} {braces}"')
    own = SkillMixPrompts.read(path)
    assert own.message("write", PAIR) == Message("user", "irony, metaphor / bread baking {braces}")
    assert own.grade == SkillMixPrompts().grade
    for text, words in [
        ('write = "{topic}"', "write must hold {skills} or {names}"),
        ('write = "{names}"', "write must hold {topic}"),
        ('grade = "{topic} {skills}"', "grade must hold {text}"),
        ('improve = "{text}"', "improve must not hold {text}"),
        ('rite = "x"', "rite"),
        ("write = ", "cannot be used"),
    ]:
        path.write_text(text)
        with pytest.raises(CorpusError, match=words):
            SkillMixPrompts.read(path)
    with pytest.raises(CorpusError, match=r"gone\.toml cannot be used"):
        SkillMixPrompts.read(tmp_path / "gone.toml")


# -- grades


def grade(skills: int, others: int, k: int = 3) -> Grade:
    return Grade(tuple(i < skills for i in range(k)), *(i < others for i in range(3)))


def test_equation_scores_of_a_table_by_hand() -> None:
    # s = 3 3 2 0 of 3, o = 3 2 3 3: one has full marks; two show all; (1 + 0 + 2/3 + 0) / 4.
    grades = [[grade(s, o)] for s, o in ((3, 3), (3, 2), (2, 3), (0, 3))]
    expected = {"full_marks": 0.25, "all_skills": 0.5, "skill_fraction": 5 / 12}
    assert skill_mix_scores(grades) == pytest.approx(expected)
    assert [g.points for (g,) in grades] == [6, 5, 5, 3]


def test_equation_several_texts_for_one_combination() -> None:
    # First: full (1, 1, 1) and off the topic (0, 1, 0). Second: 1/3 and 2/3, neither whole.
    grades = [[grade(3, 3), grade(3, 2)], [grade(1, 3), grade(2, 3)]]
    best = {"full_marks": 0.5, "all_skills": 0.5, "skill_fraction": (1 + 2 / 3) / 2}
    mean = {"full_marks": 0.25, "all_skills": 0.5, "skill_fraction": (0.5 + 0.5) / 2}
    assert skill_mix_scores(grades, "max") == pytest.approx(best)
    assert skill_mix_scores(grades, "mean") == pytest.approx(mean)
    for wrong in ([], [[]]):
        with pytest.raises(ValueError, match="every combination must have a grade"):
            skill_mix_scores(wrong)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What IRONY this is.", True),
        ("irony", True),
        ("(Irony)", True),
        ("ironyclad", False),
        ("ironic", False),
        ("non_irony", False),
    ],
)
def test_equation_what_names_a_skill(text: str, named: bool) -> None:
    assert names_skill(text, "irony") == named
    assert names_skill(text.casefold().replace("rony", "\tRONY"), "i rony") == named


def test_property_a_named_skill_is_not_shown_whoever_grades() -> None:
    texts = [(PAIR, "How nice, the bread baking."), (PAIR, "Such irony, bread baking."), (PAIR, "A metaphor of irony.")]
    expected = [(True, True), (False, True), (False, False)]
    by_model = [g.grade.skills for g in Grader(judge(FULL)).grade(texts) if g.grade]
    rules = RuleGrader({"irony": lambda t, topic: True, "Metaphor": lambda t, topic: True})
    by_rules = [g.grade.skills for g in rules.grade(texts) if g.grade]
    assert by_model == by_rules == expected


def test_property_the_grader_reads_the_text_and_what_it_was_to_show() -> None:
    generator = Recorded(judge({**FULL, "skills": [True, False], "length": False, "note": "fine"}))
    (found,) = Grader(generator).grade([(PAIR, "How nice.")])
    assert found.grade == Grade((True, False), True, False, True)
    (request,) = generator.requests
    assert request.temperature == 0
    assert all(word in request.messages[0].content for word in ("How nice.", "bread baking", "irony", "metaphor"))


@pytest.mark.parametrize("wrong", [{**FULL, "skills": [True]}, {**FULL, "skills": [True] * 3}, "no", {"skills": []}])
def test_fault_a_wrong_grade_is_asked_for_three_times_and_then_dropped(wrong: Any) -> None:
    generator = Recorded(judge(wrong))
    found, other = Grader(generator).grade([(PAIR, "How nice."), (Combination(tuple(SKILLS), "chess"), "Check.")])
    assert found.grade is None
    assert str(found.error).startswith("no grade: ")
    assert sum("How nice." in r.messages[0].content for r in generator.requests) == 3
    assert (other.grade is not None) == (isinstance(wrong, dict) and len(wrong["skills"]) == 3), "for 3 skills 3 points"
    mended = ScriptedGenerator({"grade": lambda m, r: json.dumps(FULL if len(m) > 1 else wrong)})
    (again,) = Grader(mended).grade([(PAIR, "How nice.")])
    assert again.grade == Grade((True, True), True, True, True)


def test_equation_rules_by_default() -> None:
    rules = RuleGrader({s.name: lambda text, topic: f"{topic}!" in text for s in SKILLS})
    one, three = Combination((IRONY,), "bread baking"), Combination(tuple(SKILLS), "chess")
    texts = [
        (one, "Bread  baking is fun."),
        (one, "bread baking! It is. Fun."),
        (three, "chess! Mate? Yes"),
        (three, "One e.g. two. Chessboard. 3.5 are few."),
        (one, "..."),
    ]
    found = [g.grade for g in rules.grade(texts) if g.grade]
    assert [g.topic for g in found] == [True, True, True, False, False]
    assert [g.length for g in found] == [True, False, False, False, True]
    assert [g.sense for g in found] == [True, True, True, True, False]
    assert [g.skills for g in found] == [(False,), (True,), (True,) * 3, (False,) * 3, (False,)]
    with pytest.raises(ValueError, match="there is no rule for the skill 'metaphor'"):
        list(RuleGrader({"irony": lambda t, topic: True}).grade([(PAIR, "x")]))


def test_rejects_rules_that_are_none() -> None:
    assert RuleSpec(use="headwater.claims.skill_mix:RULES").open().unknown(SKILLS) == [
        "irony",
        "metaphor",
        "modus ponens",
    ]
    for use, words in [
        ("headwater.claims.skill_mix:SKILLS", "is SkillSet; give MODULE:NAME of a RuleGrader"),
        ("headwater.claims.skill_mix:RULE", "is NoneType"),
        ("headwater.claims.skill_mix", "is NoneType"),
        ("no_such_module:RULES", "cannot be imported: No module named 'no_such_module'"),
        (":RULES", "cannot be imported"),
    ]:
        with pytest.raises(CorpusError, match=words):
            RuleSpec(use=use).open()


# -- texts


def test_property_a_text_is_written_and_improved_in_one_conversation() -> None:
    generator = Recorded(writer())
    (text,) = write_texts(generator, [PAIR], reply_tokens=77, temperature=0.5)
    first, second = generator.requests
    assert [m.role for m in text.messages] == ["user", "assistant", "user", "assistant"]
    assert first.messages == text.messages[:1]
    assert second.messages == text.messages[:3]
    assert text.text == f"{text.messages[1].content} Indeed."
    assert {(r.max_tokens, r.temperature) for r in generator.requests} == {(77, 0.5)}
    (once,) = write_texts(writer(), [PAIR], second_turn=False)
    assert len(once.messages) == 2


def test_property_draws_of_one_combination_stand_together_and_differ() -> None:
    generator = Recorded(
        writer(write=lambda m, r: str(r.random()), improve=lambda m, r: f"{m[1].content} {r.random()}")
    )
    other = Combination((METAPHOR,), "chess")
    texts = write_texts(generator, [PAIR, other], samples=3)
    assert [(t.combination, t.sample) for t in texts] == [(c, s) for c in (PAIR, other) for s in range(3)]
    assert len({t.text for t in texts}) == len({t.id for t in texts}) == 6
    assert all(t.text.startswith(t.messages[1].content) for t in texts)
    assert [r.tag for r in generator.requests] == ["write"] * 6 + ["improve"] * 6


@pytest.mark.parametrize("second_turn", [True, False])
def test_fault_a_failed_request_has_no_text_and_an_empty_reply_no_point(second_turn: bool) -> None:
    replies = {"t0": "one", "t1": "two", "t2": " ", "t3": "four"}
    asked = [Combination((skill,), f"t{i}") for i, skill in enumerate((IRONY, METAPHOR, MODUS, IRONY))]

    def write(messages: Sequence[Message], _: random.Random) -> str:
        return next(reply for topic, reply in replies.items() if topic in messages[0].content)

    generator = Recorded(writer(write=write, improve=lambda m, r: m[1].content), fails=(1,))
    rules = RuleGrader({s.name: lambda t, topic: True for s in SKILLS}, topic=lambda t, topic: True)
    texts = grade_texts(rules, write_texts(generator, asked, second_turn=second_turn))
    failed = {1, 2} if second_turn else {1}  # the second turns are numbered anew
    assert {i for i, t in enumerate(texts) if t.error == "the server is gone"} == failed
    assert {i for i, t in enumerate(texts) if t.grade is None} == failed
    if not second_turn:
        assert texts[2].grade == Grade((False,), False, False, False)
    assert [t.text for t in kept(texts)] == [t.text for t in kept(texts, "all")] == ["one", "four"]
    assert score_texts(texts)["full_marks"] == (1.0 if second_turn else pytest.approx(2 / 3))


def test_rejects_texts_of_which_none_can_be_kept() -> None:
    rules = RuleGrader({s.name: lambda text, topic: "sky" in text and topic == "bread baking" for s in SKILLS})
    texts = grade_texts(rules, write_texts(writer(), [PAIR, Combination((IRONY, MODUS), "chess")]))
    with pytest.raises(CorpusError) as caught:
        kept(texts)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("none of 2 texts can be kept.")
    assert lines[1] == "  2 of 2: it is too long"
    missing = {f"  1 of 2: it does not show {name!r}" for name in ("irony", "modus ponens")}
    assert set(lines[2:]) == {*missing, "  1 of 2: it is off the topic"}
    assert len(kept(texts, "all")) == 2
    with pytest.raises(CorpusError, match="none of 1 texts has a grade: no grade: "):
        score_texts(grade_texts(Grader(judge("no")), texts[:1]))


def test_oracle_the_table_opens_in_datasets_and_in_our_reader(tmp_path: Path) -> None:
    texts = grade_texts(Grader(judge(FULL)), write_texts(writer(), [PAIR], samples=2))
    lost = SkillText(PAIR, texts[0].messages[:1], 2, error="gone")
    write_table([*texts, lost], tmp_path / "t.parquet")
    opened = load_dataset(
        "parquet", data_files=str(tmp_path / "t.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert opened[:] == build_dataset([*texts, lost])[:]
    row = opened[0]
    assert row["messages"] == [{"role": m.role, "content": m.content} for m in texts[0].messages]
    assert (row["answer"], row["skills"], row["topic"], row["k"]) == (
        texts[0].text,
        ["irony", "metaphor"],
        "bread baking",
        2,
    )
    assert (row["shown"], row["on_topic"], row["short_enough"], row["makes_sense"]) == ([True, True], True, True, True)
    assert [r["error"] for r in opened] == [None, None, "gone"]
    assert (opened[2]["answer"], opened[2]["shown"]) == ("", None)
    ours = list(read_documents(tmp_path / "t.parquet"))
    assert [messages_of(d) for d in ours] == [t.messages for t in (*texts, lost)]
    with pytest.raises(ValueError, match="there is no text"):
        build_dataset([])


class Counting(Generator):
    """Reads all that it is sent before it answers, and counts how much that is each time."""

    id, window = "counting", 64

    def __init__(self) -> None:
        self.calls: list[int] = []

    def flow(self, requests: Iterator[Request | None]) -> Any:
        self.calls.append(len(list(requests)))
        yield from ((i, Reply("text", "stop", 1, 1, 0.0, False, "m")) for i in reversed(range(self.calls[-1])))


def test_property_a_server_is_sent_all_first_turns_at_once() -> None:
    generator = Counting()
    texts = write_texts(generator, draw_combinations(pool(12), ["a", "b"], 2, 96, rng()))
    assert generator.calls == [96, 96]
    assert len(texts) == 96
