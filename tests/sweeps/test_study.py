"""A study file is checked whole: every fault at once, with its line, what was found and what is allowed."""

from pathlib import Path

import pytest

from sweeps.errors import InputError
from sweeps.gridkinds import IsoflopGrid, LogRange, listed
from sweeps.studyfile import SHIPPED, find_study_file, load_study

GOOD = """
name: small
families: [llama]
grid: {type: isoflop, budgets: [1e9, 2e9], sizes: 3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def faults(folder: Path, text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_study(write(folder, text))
    return str(caught.value)


def test_a_short_file_gets_sane_defaults(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, GOOD))
    assert study.corpus.source == "pystdlib"
    assert study.tokenizer == "bytes"
    assert study.seeds == [0]
    assert study.families == {"llama": {}}
    assert isinstance(study.grid, IsoflopGrid)
    assert listed(study.grid.budgets) == (1e9, 2e9), "1e9 without a dot is text in YAML 1.1, and meant as a number"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_study(path).name == path.stem
    assert find_study_file(path.stem) == path


def test_all_faults_come_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = faults(
        tmp_path,
        """name: bad name!
corpus: pystdlibb
familes: [llama]
families: [llama]
grid:
  type: isoflop
  budgets: [1e11, -5, .nan]
  sizess: 5
training:
  learning_rat: 3
  schedule: cosin
seeds: []
""",
    )
    for line, words in [
        (1, "name: found 'bad name!'"),
        (2, "corpus.source: found 'pystdlibb'; allowed: pystdlib, folder, jsonl, parquet, hf, markov (did you mean \""),
        (3, 'familes: unknown key (did you mean "families"?)'),
        (7, "grid.budgets[1]: found -5; input should be greater than 0"),
        (7, "grid.budgets[2]: found nan; input should be a finite number"),
        (8, 'grid.sizess: unknown key (did you mean "sizes"?); allowed: type, budgets, sizes, stride'),
        (10, 'training.learning_rat: unknown key (did you mean "learning_rate"?)'),
        (11, "training.schedule: found 'cosin'; allowed: cosine, linear, constant, wsd (did you mean \"cosine\"?)"),
        (12, "seeds: found []"),
    ]:
        assert f"study.yaml:{line}: {words}" in text
    assert text.startswith("9 faults")


def test_all_hyperparameters_at_fault_are_named_each_on_its_line(tmp_path: Path) -> None:
    grid = (
        "grid:\n  type: points\n  points:\n  - size: 1e4\n    tokens: 9e4\n    training:\n      lr: 1\n      eps: 0\n"
    )
    vary = "vary:\n  learning_rat: [1]\n  beta1: [2, 0.9, 3]\n  epss: {times: [1]}\n  clip_norm: {times: [2]}\n"
    space = "  space:\n    beta2: {linear: [0, 1]}\n    init: {log: [1, 2]}\n"
    search = f"search:\n  sampler: tpee\n{space}  start: [{{beta3: 1}}]\n"
    text = faults(tmp_path, f"name: s\nfamilies: [llama]\n{grid}{vary}{search}")
    for line, words in [
        (9, "grid.points[0].training.lr: found 1; unknown hyperparameter 'lr'"),
        (10, "grid.points[0].training.eps: found 0; eps: found 0; input should be greater than 0"),
        (12, "vary.learning_rat: found [1]; unknown hyperparameter 'learning_rat' (did you mean \"learning_rate\"?)"),
        (13, "vary.beta1: found [2, 0.9, 3]; beta1: found 2; input should be less than 1"),
        (13, "vary.beta1: found [2, 0.9, 3]; beta1: found 3; input should be less than 1"),
        (14, "vary.epss: found {'times': [1.0]}; unknown hyperparameter 'epss' (did you mean \"eps\"?)"),
        (17, "search.sampler: found 'tpee'; allowed: tpe, gp"),
        (19, "search.space.beta2: found {'linear': (0.0, 1.0)}; beta2: found 1.0; input should be less than 1"),
        (20, "search.space.init: found {'log': (1.0, 2.0)}; unknown hyperparameter 'init'"),
        (21, "search.start[0].beta3: found 1; unknown hyperparameter 'beta3' (did you mean \"beta2\"?)"),
    ]:
        assert f"study.yaml:{line}: {words}" in text
    assert text.startswith("10 faults")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("grid: {type: isoflopp, budgets: [1e9]}", 'did you mean "isoflop"'),
        ("grid: {type: isoflop, budgets: []}", "at least 1 item"),
        ("grid: {type: isoflop, budgets: [true]}", "not true or false"),
        ("grid: {type: isoflop}", "grid.budgets: missing"),
        ("grid: {type: points, points: [{size: 1e4, tokens: 1, flops: 2}]}", "exactly one of tokens, flops"),
        ("grid: {type: points, points: [{size: 1e4, tokens: 9, training: {lr: 1}}]}", "unknown hyperparameter 'lr'"),
        ("grid: {type: ladder, sizes: {from: 1e4, to: 1e5}, tokens_per_parameter: [20]}", "points: missing"),
        ("grid: {type: ladder, sizes: [1e4]}", "exactly one of tokens, tokens_per_parameter"),
        ("vary: {learning_rat: [1]}", 'did you mean "learning_rate"'),
        ("vary: {beta1: [2]}", "beta1: found 2"),
        ("workers: 0", "workers: found 0"),
        ("workers: automatic", "workers: found 'automatic'"),
        ("trainer: mine.py:train\nworkers: 2", "trains in one process; leave out workers"),
        ("stack: 4\nworkers: 2", "a stack is several cells; leave out stack"),
        ("vary: {learning_rate: {times: []}}", "at least 1 item"),
        ("vary: {learning_rate: {log: {from: 0.1, to: 0.1, points: 5}}}", "from 0.1 to 0.1 there are not 5 values"),
        ("grid: {type: isoflop, budgets: {from: 1e9, to: 1e9, points: 2}}", "there are not 2 values"),
        ("training: 3", "training: found 3; a mapping is wanted"),
        ("vary: {learning_rate: [null]}", "learning_rate: found None"),
        ("vary: {schedule: {times: [2]}}", "schedule is no number, so it has no multiples; list its values"),
        ("vary: {optimizer: {times: [2]}}", "optimizer is no number, so it has no multiples; list its values"),
        ("vary: {optimizer: [adam]}", "optimizer: found 'adam'"),
        ("context: 1.5", "context: found 1.5"),
        ("training: {learning_rate: {value: 1, at: {width: 1}, power: {depth: 1}}}", "they must name the same"),
        ("training: {learning_rate: {value: 1, at: {height: 1}, power: {height: 1}}}", "allowed: N, D, C, width"),
        ("corpus: {source: folder}", 'needs "path"'),
        (
            "training: {cooldown_fraction: 1}",
            "found 1; the cooldown is a share of the run: more than 0 and less than 1",
        ),
        (
            "training: {schedule: {kind: wsd, cooldown_fraction: 0}}",
            "training.schedule.cooldown_fraction: found 0; the",
        ),
        ("training: {schedule: {kind: wsdd}}", "training.schedule.kind: found 'wsdd'; allowed: cosine, linear"),
        ("training: {schedule: {cooldown_fraction: 0.2}}", "training.schedule.kind: missing"),
        ("training: {schedule: {kind: wsd, cooldown: 0.2}}", "training.schedule.cooldown: unknown key"),
        ("training: {schedule: {kind: wsd, cooldown_shape: exp}}", "allowed: sqrt, linear, cosine"),
        ("training: {schedule: {kind: cosine, cooldown_fraction: 0.2}}", "cosine has no cooldown_fraction; it has"),
        ("training: {schedule: {kind: wsd, final_fraction: 0}, final_fraction: 0}", "final_fraction given twice"),
        ("vary: {cooldown_shape: [sqrt, square]}", "cooldown_shape: found 'square'; allowed: sqrt, linear, cosine"),
        ("vary: {cooldown_fraction: [0.1, 1.5]}", "cooldown_fraction: found 1.5; the cooldown is a share of the run"),
        ("vary: {cooldown_shape: {times: [2]}}", "cooldown_shape is no number, so it has no multiples"),
        ("corpus: {source: markov, options: {tokns: 9}}", "corpus.options.tokns: found 9; unknown corpus option"),
        ("corpus: {source: markov, options: {order: 9, tokens: 0}}", "2 faults in the study file"),
        ("corpus: {source: folder, path: x, options: {max_bytes: true}}", "max_bytes must be of type int, found True"),
        (
            "tokenizer: bpe:100",
            "study.yaml:5: tokenizer: found 'bpe:100'; tokenizer \"bpe:100\": the vocabulary size must",
        ),
        ("tokenizer: bpe:1e3", "must be a number from 257"),
        ("grid: {sizes: [1e4]}", "grid.type: missing; allowed: isoflop, ladder, points, shapes"),
        ("grid: {tpye: isoflop}", "grid.type: missing (found 'tpye'); allowed: isoflop"),
        ("grid: isoflop", "grid: found 'isoflop'; a mapping is wanted"),
        ("vary: {beta1: {from: 0.1, to: 0.9, points: 3}}", "1 fault in the study file"),
        ("vary: {beta1: {time: [0.9]}}", "{times: [a, b]} or {log: {from: a, to: b, points: n}} is wanted"),
        ("families: {llama: {tied: maybe}}", "tied: found 'maybe'; a number, or true or false, is wanted"),
        ("families: {llama: {heads_per_kv: .nan}}", "1 fault in the study file"),
        ("families: {}", "at least one family"),
        ("families: [{llama: {tied: true}}]", "With options, write families: {llama: {"),
        ("families: [[llama]]", "a list names families; found ['llama']"),
        (
            "grid: {type: points, points: [{size: 1e4, tokens: 9, training: {beta1: 0.9}}]}\nvary: {beta1: [0.8, 0.7]}",
            "beta1 is set at a point of the grid too; take it out there, or vary its {times: ..}",
        ),
        ("seeds: [-1]", "greater than or equal to 0"),
        ("limits: {cells: 0}", "limits.cells: found 0; "),
        ("limits: {gpus: -1}", "limits.gpus: found -1; "),
        ("limits: {flops: 0}", "limits.flops: found 0; "),
        ("limits: {gpu_hours: 0.0}", "limits.gpu_hours: found 0.0; "),
        ("limits: {cells: 1.5}", "limits.cells: found 1.5; "),
        ("limits: {priority: 0.5}", "limits.priority: found 0.5; "),
        ("limits: {gpu_hour: 5}", 'limits.gpu_hour: unknown key (did you mean "gpu_hours"?)'),
    ],
)
def test_a_fault_says_what_was_found_and_what_is_allowed(tmp_path: Path, change: str, words: str) -> None:
    key = change.split(":")[0]
    kept = "\n".join(line for line in GOOD.splitlines() if not line.startswith(f"{key}:"))
    assert words in faults(tmp_path, f"{kept}\n{change}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.system [id]", "tags are not allowed"),
        ("a: &x [1]\nb: [*x, *x]", "anchors and aliases"),
        ("name: [", "expected"),
        ("x: 1\nx: 2", "key 'x' stands twice"),
        ("- 1", "a mapping with the keys name"),
        ("", "a mapping with the keys name"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_would_execute_or_explode_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in faults(tmp_path, text)


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_study(path)
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(InputError, match="at most 1,000,000"):
        load_study(path)
    with pytest.raises(InputError, match='did you mean "quickstart"'):
        find_study_file("quickstrat")


def test_a_log_range_hits_both_ends_and_is_even_in_the_logarithm() -> None:
    values = LogRange(**{"from": 1e9, "to": 1.6e10, "points": 5}).values()
    assert values == (1e9, 2e9, 4e9, 8e9, 1.6e10)


def test_a_corpus_option_may_be_a_number_as_any_other_in_the_file(tmp_path: Path) -> None:
    for number in ("1e5", "1.0e+5", "100000"):
        text = f"{GOOD}corpus: {{source: markov, options: {{tokens: {number}}}}}\n"
        options = load_study(write(tmp_path, text)).corpus.options
        assert options == {"tokens": 100_000}
        assert type(options["tokens"]) is int


def test_a_hugging_face_dataset_is_named_in_short(tmp_path: Path) -> None:
    for corpus in ("hf:roneneldan/TinyStories", "{source: 'hf:roneneldan/TinyStories'}"):
        source = load_study(write(tmp_path, f"{GOOD}corpus: {corpus}\n")).corpus
        assert (source.source, source.path) == ("hf", "roneneldan/TinyStories")


def test_a_schedule_with_its_fields_is_the_same_as_the_fields_beside_it(tmp_path: Path) -> None:
    inside = "training: {schedule: {kind: wsd, cooldown_fraction: .3, cooldown_shape: linear, warmup_tokens: 100}}"
    beside = "training: {schedule: wsd, cooldown_fraction: .3, cooldown_shape: linear, warmup_tokens: 100}"
    one, other = (load_study(write(tmp_path, GOOD + text)) for text in (inside, beside))
    assert one == other
    assert (one.training.schedule, one.training.cooldown_fraction) == ("wsd", 0.3)


def test_a_fault_inside_a_schedule_has_its_own_line(tmp_path: Path) -> None:
    text = faults(tmp_path, GOOD + "training:\n  schedule:\n    kind: wsd\n    cooldown_fraction: 7\n")
    assert "study.yaml:8: training.schedule.cooldown_fraction: found 7" in text


def test_several_workers_train_no_stacks(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, f"{GOOD}workers: 2\n"))
    assert (study.workers, study.stack) == (2, "off")
    assert load_study(write(tmp_path, GOOD)).workers == "auto"
