"""Figures in the documents equal those in the JSON files of docs/results."""

import json
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest

from model.checkpoint import load
from model.clip_guidance import START, STOP
from model.prompts import LEAST_SHARE
from model.spec import EMBEDDED, SHIPPED, SHIPPED_CIFAR10, SHIPPED_FAST, SHIPPED_LETTERS
from scripts.benchmark.endurance import problem_in
from scripts.benchmark.loads import PUBLISHED
from scripts.benchmark.page import page_of, table_in
from scripts.common.mnist import load_mnist
from scripts.evaluation.classifiers import load_classifier, probabilities_of
from scripts.evaluation.clip_attributes import ATTRIBUTES, Comparison, as_markdown
from scripts.evaluation.clip_guidance import SCALE
from scripts.evaluation.clip_prompts import Group
from scripts.evaluation.clip_prompts import as_markdown as prompts_as_markdown
from scripts.evaluation.tables import (
    FRECHET_RATIO,
    as_clip_row,
    as_column,
    as_run,
    as_setting,
    as_sweep_row,
    read_evaluation,
    shares_of,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
FINAL = [  # tables of metrics of 10,000 digits: document, and the evaluation in each column
    ("docs/evaluation.md", ("ddpm", "dpmpp-50", "dpmpp-20", "dpmpp", "dpmpp-off", "fast", "fast-2", "fast-1")),
    ("docs/model-card.md", ("ddpm", "dpmpp-20", "dpmpp", "dpmpp-off")),
    ("docs/model-card.md", ("fast", "fast-2", "fast-1")),
]
# These tables have the extractor of release 0.1.0, as they say. The networks of most of them no longer exist.
EARLIER = (
    *("naive", "baseline", "baseline-seed-1", "baseline-ema", "baseline-conditioned", "baseline-cosine"),
    *("default-eps", "default-eps-seed-1", "default-eps-guided", "default-edm", "default"),
    *("default-eps-sweep", "default-edm-sweep", "default-sweep", "no-attention", "narrow", "one-pair"),
    "steps",
)
# These figures were measured with the weights of release 0.1.0, as the documents say.
EARLIER_WEIGHTS = "e723f8daea0c30f6b1c3a3341149ef1aa52cca01cae127d2ce7a4eb980a7b6f7"
EARLIER_EXTRACTOR = "0890a7eed8727647a82822ac9be2e816fb8e1b3f98c702b96a645551fed9774b"
WITHOUT_DATA = ("Norms, activations and sizes",)  # sections of the notes without JSON files
MACHINE_NAMES = {"xeon": "Xeon with AMX", "epyc": "EPYC, Zen 4", "zen5": "EPYC, Zen 5"}
SPEED = {  # row of the speed tables -> load and column in the results
    "latency of one image, idle service, s": ("1 x 1 image", "p50, s"),
    "the same with guidance, s": ("1 x 1 image, guided", "p50, s"),
    "latency of one image during a request for 64, s": ("1 x 1 image with 1 x 64: 1 image", "p50, s"),
    "images/s, 64 clients of one image": ("64 x 1 image", "images/s"),
    "images/s, 2 clients of 64 images": ("2 x 64 images", "images/s"),
    "the same with guidance, images/s": ("2 x 64 images, guided", "images/s"),
    "images/s, 2 clients of 64 images, while another process uses one core": (
        "2 x 64 images, another process on one core",
        "images/s",
    ),
}
RANDOM = "70% of the slower service's capacity"
COMPARISON = {  # row of the comparison table -> file, load and column in the results
    "images/s, 64 clients, Xeon": ("xeon/alternatives-small", "64 x 1 image", "images/s"),
    "p95 at random arrivals, s, Xeon": ("xeon/alternatives-small", RANDOM, "p95, s"),
    "p95 of 10-step requests, s, Xeon": (
        "xeon/alternatives-small",
        f"{RANDOM}, half with 10 steps: 10 steps",
        "p95, s",
    ),
    "images/s, 64 clients, Zen 4": ("epyc/alternatives-small", "64 x 1 image", "images/s"),
    "p95 at random arrivals, s, Zen 4": ("epyc/alternatives-small", RANDOM, "p95, s"),
    "p95 of 10-step requests, s, Zen 4": (
        "epyc/alternatives-small",
        f"{RANDOM}, half with 10 steps: 10 steps",
        "p95, s",
    ),
    "images/s, 2 clients of 64 images, Xeon": ("xeon/alternatives-large", "2 x 64 images", "images/s"),
    "images/s, 2 clients of 64 images, Zen 5": ("zen5/alternatives-large", "2 x 64 images", "images/s"),
}
CONTESTANTS = {
    "unfog": "unfog",
    "LitServe, 0.01": "litserve --batch-timeout 0.01",
    "LitServe, 0.1": "litserve --batch-timeout 0.1",
    "batched": "batched",
    "diffusers": "diffusers",
    "diffusers-tuned": "diffusers-tuned",
}
LADDER = RESULTS / "benchmarks" / "zen5" / "models.json"
EVALUATIONS = sorted((RESULTS / "ablations").rglob("evaluation.json"))
SWEEPS = sorted({*RESULTS.rglob("guidance.json"), *RESULTS.rglob("steps.json")})
MACHINES = sorted(path for path in (RESULTS / "benchmarks").iterdir() if path.is_dir())
NOTES = RESULTS / "notes"
ABLATIONS = (NOTES / "ablations.md").read_text("utf-8")
EVALUATION = (DOCS / "evaluation.md").read_text("utf-8")
DATA_SETS = (DOCS / "datasets.md").read_text("utf-8")
CLIP_GUIDANCE = (NOTES / "clip-guidance.md").read_text("utf-8")


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(RESULTS)) for path in paths]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("document", "names"), FINAL)
def test_final_table_matches_its_evaluation_files(document: str, names: tuple[str, ...]) -> None:
    evaluations = [read_evaluation(RESULTS / "final" / name) for name in names]
    shipped = {load(path).weights_sha256 for path in (SHIPPED, SHIPPED_FAST)}
    assert {evaluation["weights_sha256"] for evaluation in evaluations} <= shipped
    columns = [*map(as_column, evaluations), as_column(evaluations[0], real=True)]
    rows = [cells(line) for line in (ROOT / document).read_text().splitlines() if line.startswith("|")]
    for name in columns[0]:
        assert [name, *(column[name] for column in columns)] in rows


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("`ddpm`, 100 steps", "ddpm"),
        ("`dpmpp`, 10 steps", "dpmpp"),
        ("`fast`, 4 steps", "fast"),
        ("`fast`, 2 steps", "fast-2"),
        ("`fast`, 1 step", "fast-1"),
    ],
)
def test_model_card_has_the_recognition_of_each_digit(label: str, name: str) -> None:
    shares = shares_of(read_evaluation(RESULTS / "final" / name)["judge"])
    row = as_written([label, *(f"{share:.1%}" for share in shares)])
    assert row in (DOCS / "model-card.md").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("shipped", "names"),
    [
        (SHIPPED, ("ddpm", "dpmpp-20", "dpmpp", "dpmpp-off")),
        (SHIPPED_FAST, ("fast", "fast-2", "fast-1")),
    ],
)
def test_final_evaluations_match_the_shipped_checkpoint_and_its_metadata(shipped: Path, names: tuple[str, ...]) -> None:
    loaded = load(shipped)
    evaluations = [read_evaluation(RESULTS / "final" / name) for name in names]
    assert loaded.config.training["evaluation"] == evaluations
    for evaluation in evaluations:
        options = evaluation["options"]
        recommended = asdict(loaded.config.guidance_of(options["sampler"]))
        assert evaluation["weights_sha256"] == loaded.weights_sha256
        assert evaluation["num_images"] == 10_000
        assert options["guidance"] == recommended or options["guidance"]["scale"] == 1


@pytest.mark.parametrize("name", ["ddpm", "dpmpp", "fast"])
def test_served_digits_have_the_published_quality(name: str) -> None:
    served, before = (read_evaluation(RESULTS / "served" / folder) for folder in (name, f"{name}-published"))
    assert (served["num_images"], served["networks"]) == (before["num_images"], before["networks"])
    assert served["judge"]["accuracy"] == pytest.approx(before["judge"]["accuracy"], abs=0.001)
    assert served["frechet_ratio"] == pytest.approx(before["frechet_ratio"], abs=0.1)
    text = (NOTES / "speed.md").read_text()
    lines = [cells(line) for line in text.splitlines() if line.startswith(f"| `{name}`")]
    columns = [as_column(evaluation) for evaluation in (served, before)]
    wanted = ("recognised as asked", FRECHET_RATIO)
    assert [line[1:] for line in lines] == [[column[figure] for figure in wanted] for column in columns]


def rows_of(path: Path) -> list[list[str]]:
    """Returns the table rows of a result file. An evaluation has three forms: complete, without its name, and without
    name, sampler and steps."""
    if path.name == "evaluation.json":
        row = as_run(path.parent.name, read_evaluation(path))
        return [row] if path.parents[1] == RESULTS / "ablations" else [row, row[1:], row[3:]]
    content = json.loads(path.read_text())
    return [as_sweep_row(row) for row in (*content["figures"], content["real"])]


def as_written(line: list[str]) -> str:
    return f"| {' | '.join(line)} |"


@pytest.mark.parametrize("file", named(EVALUATIONS))
def test_every_evaluation_file_has_a_row_in_the_notes(file: str) -> None:
    assert set(map(as_written, rows_of(RESULTS / file))) & set(ABLATIONS.splitlines())


@pytest.mark.parametrize("file", named(SWEEPS))
def test_every_sweep_has_a_table_with_a_row_of_real_digits(file: str) -> None:
    wanted = set(map(as_written, rows_of(RESULTS / file)))
    assert any(wanted <= set(table.splitlines()) for table in ABLATIONS.split("\n\n"))


def test_every_row_of_the_ablations_has_a_result_file() -> None:
    measured = {as_written(row) for path in (*EVALUATIONS, *SWEEPS) for row in rows_of(path)}
    sections = [section for section in ABLATIONS.split("\n## ") if not section.startswith(WITHOUT_DATA)]
    claimed = {line for section in sections for line in section.splitlines() if line.startswith("|") and "%" in line}
    assert claimed <= measured
    shown = {line for line in (DOCS / "ablations.md").read_text("utf-8").splitlines() if line.count("%") > 1}
    assert {line for line in shown if line.startswith("|")} <= measured


def test_synthetic_classifier_figures_match_the_file() -> None:
    learned = json.loads((RESULTS / "synthetic.json").read_text())
    rows = [cells(line) for line in EVALUATION.splitlines() if line.startswith("|")]
    for kind, label in (("drawn", "generated digits, `dpmpp` in 10 steps"), ("real", "real digits")):
        assert [f"{learned[kind]['num_images']:,} {label}", f"{learned[kind]['accuracy']:.2%}"] in rows
    assert learned["drawn_with"]["weights_sha256"] == EARLIER_WEIGHTS
    guidance = {"scale": 1.7, "start": 40, "stop": 90}
    assert learned["drawn_with"]["options"] == {"sampler": "dpmpp", "num_steps": 10, "guidance": guidance}


def test_number_of_dropped_images_matches_the_file() -> None:
    facts = json.loads((RESULTS / "filtered.json").read_text())
    dropped, kept = sum(facts["num_dropped"]), facts["count"]
    share = f"{dropped} of {dropped + kept:,} images, {dropped / (dropped + kept):.1%}."
    assert f"The command above dropped {share}" in DATA_SETS
    assert (facts["format"], kept, facts["min_confidence"], facts["seed"]) == ("parquet", 10_000, 0.9, 0)
    assert facts["weights_sha256"] == load(SHIPPED_FAST).weights_sha256
    assert facts["judge_sha256"] == load_classifier("judge").sha256


def test_confidence_of_real_digits_matches_the_judge(mnist_dir: Path) -> None:
    images, labels = load_mnist("test", mnist_dir)
    confidence = probabilities_of(load_classifier("judge").network, images).gather(1, labels[:, None])
    least, clear, highest = ((confidence < limit).double().mean().item() for limit in (0.9, 0.96, 0.97))
    stated = f"{least:.1%} have less than 0.9, {clear:.0%} have less than 0.96, and {highest:.0%} have less than 0.97."
    assert stated in DATA_SETS


def test_fog_table_matches_the_file() -> None:
    fog = json.loads((RESULTS / "fog.json").read_text())
    assert as_written(["t", *map(str, fog["half_lost_at"])]) in EVALUATION.splitlines()


def test_clip_figures_match_the_evaluation_and_the_model_metadata() -> None:
    seen = read_evaluation(RESULTS / "clip-digits.json")["clip"]
    training = json.loads((EMBEDDED / "open_clip_config.json").read_text())["training"]
    rows = [
        cells(line)
        for line in EVALUATION.split("\n## CLIP\n")[1].split("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    shares = {row[0]: row[1] for row in rows if len(row) == 2}
    assert shares["real test digits"] == f"{seen['real']['recognised']:.2%}" == f"{training['test']['recognised']:.2%}"
    assert shares["real validation digits"] == f"{training['validation']['recognised']:.2%}"
    assert f"{seen['drawn']['recognised']:.2%}" in shares.values()
    assert seen["real"]["tells_noise"] == 1


@pytest.mark.parametrize("split", ["validation", "test"])
def test_tables_of_clip_guidance_match_the_files(split: str) -> None:
    content = json.loads((RESULTS / f"clip-guidance.{split}.json").read_text())
    table = [as_written(as_clip_row(row)) for row in (*content["figures"], content["real"])]
    assert "\n".join(table) in CLIP_GUIDANCE
    assert content["sweep"]["split"] == split
    assert content["sweep"]["weights_sha256"] == EARLIER_WEIGHTS


def test_clip_guidance_reaches_the_stated_accuracy_and_similarity() -> None:
    content = json.loads((RESULTS / "clip-guidance.test.json").read_text())
    off, clip, guided, both = content["figures"]
    recommended = {"scale": SCALE, "start": START, "stop": STOP}
    assert clip["options"]["clip"]["guidance"] == both["options"]["clip"]["guidance"] == recommended
    assert guided["options"]["guidance"] == {"scale": 3.0, "start": 20, "stop": 65}
    assert content["sweep"]["num_images"] == 2000
    assert off["judge"] < 0.99 <= clip["judge"]
    assert both["judge"] >= guided["judge"]
    assert off["similarity"] < clip["similarity"] and guided["similarity"] < both["similarity"]


def test_table_of_attributes_matches_the_file_and_every_digit_changes_as_asked() -> None:
    content = json.loads((RESULTS / "clip-attributes.json").read_text())
    comparisons = [Comparison(**row) for row in content["comparisons"]]
    assert as_markdown(comparisons, content["recognised"]).strip() in CLIP_GUIDANCE
    assert [(c.attribute, c.digit) for c in comparisons] == [(a.name, d) for a in ATTRIBUTES for d in range(10)]
    assert max(comparison.p for comparison in comparisons) < 1e-3


def test_table_of_prompts_matches_the_file_and_suitable_prompts_get_no_warning() -> None:
    content = json.loads((RESULTS / "clip-prompts.json").read_text())
    groups = {row["name"]: Group(**row) for row in content["groups"]}
    assert prompts_as_markdown(list(groups.values())).strip() in CLIP_GUIDANCE
    assert f"{content['limit']:.2f}" in CLIP_GUIDANCE.split("\n## Warnings\n")[1].split("\n## ")[0]
    assert content["limit"] == pytest.approx(LEAST_SHARE * content["typical"])
    assert groups["prompts with the digit"].warned == 0
    assert groups["prompts with another digit"].low > 0.99
    assert groups["prompts about noise"].low == 1
    assert groups["unrelated prompts"].warned == 1
    assert max(groups[f"{kind} digits and their prompts"].low for kind in ("real", "generated")) < 0.03


def test_memory_table_matches_the_file_and_container_limits_exceed_it_by_half() -> None:
    memory = json.loads((RESULTS / "memory.json").read_text())["mebibytes"]
    document = (DOCS / "deployment.md").read_text("utf-8").split("\n## Memory\n")[1].split("\n## ")[0]
    for name, found in memory.items():
        assert f"| {name} | {found['service']:,} | {found['child']:,} | {found['sum']:,} |" in document
    manifest = (ROOT / "deploy/kubernetes/cpu/deployment.yaml").read_text()
    (pod,) = set(re.findall(r"memory: (\d+)Gi", manifest))  # the request equals the limit
    (compose,) = re.findall(r"UNFOG_MEMORY:-(\d+)g", (ROOT / "docker-compose.cpu.yml").read_text())
    assert (
        f"The limits on a CPU are {compose} GiB in `docker-compose.cpu.yml` (`UNFOG_MEMORY`) and {pod} GiB" in document
    )
    assert min(int(pod), int(compose)) * 1024 >= 1.5 * memory["with CLIP"]["sum"]
    assert 1.5 * memory["without CLIP"]["sum"] <= 1024  # the limit that the manifest recommends without CLIP


def test_evaluations_used_the_shipped_classifiers() -> None:
    shipped = {name: load_classifier(name).sha256 for name in ("judge", "extractor", "fog_judge")}
    for path in (*RESULTS.glob("final/*/evaluation.json"), *EVALUATIONS):
        networks = json.loads(path.read_text())["networks"]
        extractor = EARLIER_EXTRACTOR if path.parent.name in EARLIER else shipped["extractor"]
        expected = {"judge": shipped["judge"], "extractor": extractor}
        assert {name: network["sha256"] for name, network in networks.items()} == expected
    for path in SWEEPS:
        sweep = json.loads(path.read_text())["sweep"]
        extractor = EARLIER_EXTRACTOR if path.parent.name in EARLIER else shipped["extractor"]
        assert (sweep["judge_sha256"], sweep["extractor_sha256"]) == (shipped["judge"], extractor)
    assert json.loads((RESULTS / "fog.json").read_text())["judge"]["sha256"] == shipped["fog_judge"]


@pytest.mark.parametrize("folder", MACHINES, ids=[folder.name for folder in MACHINES])
def test_benchmark_page_matches_the_results_of_its_machine(folder: Path) -> None:
    page = DOCS / "benchmarks" / f"{folder.name}.md"
    assert page.read_text() == page_of(folder, page)
    assert f"(benchmarks/{folder.name}.md)" in (DOCS / "benchmarks.md").read_text()


def test_speed_table_matches_the_results_of_each_machine() -> None:
    heading = as_written(["", *MACHINE_NAMES.values()]).replace("|  |", "| |")
    table = (DOCS / "benchmarks.md").read_text().split(heading)[1].split("\n\n")[0]
    measured = [own_figures(RESULTS / "benchmarks" / name / "closed.json") for name in MACHINE_NAMES]
    expected = [[name, *(of[load][column] for of in measured)] for name, (load, column) in SPEED.items()]
    assert [cells(line) for line in table.splitlines()][2:] == expected


def own_figures(path: Path) -> dict[str, dict[str, str]]:
    """Returns the figures of this service by load and column."""
    columns, lines = table_in(json.loads(path.read_text()))
    return {line[1]: dict(zip(columns, line, strict=True)) for line in lines if line[0] == "unfog"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ladder_of_quality_and_latency_matches_the_evaluation_and_the_measurement(name: str) -> None:
    evaluation, measured = read_evaluation(RESULTS / "final" / name), own_figures(LADDER)
    column = as_column(evaluation)
    ratios = [column[f"{FRECHET_RATIO}{space}"] for space in ("", ", CLIP", ", EfficientNet")]
    many = measured.get(f"{name}, 2 x 64 images", {}).get("images/s", "-")
    row = [*as_setting(evaluation["options"]), column["recognised as asked"], column["worst digit"], *ratios]
    row += [measured[name]["p50, s"], many]
    assert as_written(row) in (DOCS / "benchmarks.md").read_text().splitlines()


def test_one_step_is_at_least_two_and_a_half_times_as_fast_as_four() -> None:
    rates: dict[str, list[float]] = {}
    for row in json.loads(LADDER.read_text())["rows"]:
        rates.setdefault(row["load"], []).append(row["images_a_second"])
    one, four = (statistics.median(rates[f"{name}, 2 x 64 images"]) for name in ("fast-1", "fast"))
    assert one >= 2.5 * four
    assert f"{one / four:.2f} times as many" in (DOCS / "benchmarks.md").read_text()


def test_comparison_table_matches_the_results() -> None:
    lines = (DOCS / "benchmarks.md").read_text().splitlines()
    assert as_written(["", *CONTESTANTS]).replace("|  |", "| |") in lines
    for name, place in COMPARISON.items():
        assert as_written([name, *compared(*place)]) in lines


def compared(file: str, under: str, column: str) -> list[str]:
    """Returns the figure of each service, or a dash if it was not measured."""
    columns, table = table_in(json.loads((RESULTS / "benchmarks" / f"{file}.json").read_text()))
    figures = {line[0]: line[columns.index(column)] for line in table if line[1] == under}
    return [figures.get(contestant, "-") for contestant in CONTESTANTS.values()]


def test_readme_states_the_median_latencies_of_the_comparison_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, stated in (
        (
            "p95 of 10-step requests, s, Xeon",
            "among 100-step requests has a p95 latency of {} s, compared with {} s with "
            "[LitServe](https://github.com/Lightning-AI/LitServe) (two cores of a Xeon with AMX",
        ),
        (
            "p95 at random arrivals, s, Xeon",
            "if all requests take 100 steps, the p95 latency is {} s, compared with {} s with LitServe (same machine",
        ),
    ):
        unfog, *litserve = (figure.split()[0] for figure in compared(*COMPARISON[name])[:3])
        assert stated.format(unfog, min(litserve, key=float)) in readme


def test_endurance_figures_match_the_results_and_show_no_leak() -> None:
    found, text = json.loads((RESULTS / "endurance.json").read_text()), (DOCS / "reliability.md").read_text()
    section = text.split("## Two hours of load")[1].split("\n## ")[0]
    answers, before, after = found["answers"], found["before"], found["after"]
    assert found["minutes"] >= 120
    assert set(answers) == {"0", "200", "422"}  # 0: the client disconnected before the response
    assert f"{answers['200']:,} responses with status 200, {answers['422']:,} with 422 and no others." in section
    assert f"{answers['0']:,} requests were aborted by their client." in section
    for name, label in (("megabytes", "memory, MB"), ("descriptors", "file descriptors"), ("threads", "threads")):
        under_load = f"{min(found[name]):.0f} to {max(found[name]):.0f}"
        row = [label, f"{before[name]:.0f}", under_load, f"{after[name]:.0f}", f"{found[f'{name}_an_hour']:.1f}"]
        assert as_written(row) in section
    assert problem_in(found) is None


def test_figure_of_the_tutorial_matches_its_evaluation() -> None:
    found = read_evaluation(RESULTS / "own-pictures.json")
    text = (DOCS / "your-own-data.md").read_text("utf-8")
    assert found["num_images"] == 1200
    assert f"Of 1,200 pictures from the training above, the judge recognised {found['judge']['accuracy']:.2%}" in text
    ours, real = (found[name]["precision"] for name in ("manifold", "real_manifold"))
    assert f"Their precision was only {ours:.2f} (real pictures: {real:.2f})" in text


def test_ratios_of_a_service_with_four_models_match_their_measurement_and_exceed_097() -> None:
    ratios: dict[str, list[float]] = {}
    for row in json.loads((RESULTS / "benchmarks/zen5/four-models.json").read_text())["rows"]:
        ratios.setdefault(row["load"], []).append(row["new"] / row["base"])
    stated = [
        f"{round_to(statistics.median(each))} ({round_to(min(each))} to {round_to(max(each))})"
        for each in ratios.values()
    ]
    assert f"are {', '.join(stated[:3])} and {stated[3]}, so models" in (NOTES / "speed.md").read_text("utf-8")
    assert min(statistics.median(each) for each in ratios.values()) >= 0.97


def round_to(ratio: float) -> str:
    """Returns a ratio with three digits."""
    return f"{ratio:.3f}" if ratio < 0.9995 else f"{ratio:.2f}"


def cells_in(document: str) -> list[list[str]]:
    """Returns the cells of each row of the tables of a document."""
    return [cells(line) for line in (DOCS / document).read_text("utf-8").splitlines() if line.startswith("|")]


def rows_for_classes(*columns: dict[str, str]) -> list[list[str]]:
    """Returns the rows of a table with these columns, for classes that are not digits."""

    def renamed(name: str) -> str:
        return name.replace("worst digit", "worst class").replace("real digits", "real images")

    return [[renamed(name), *(column[name] for column in columns)] for name in columns[0]]


def test_table_of_cifar10_matches_its_evaluation() -> None:
    evaluation, document = read_evaluation(RESULTS / "cifar10.json"), (DOCS / "cifar10.md").read_text("utf-8")
    rows = rows_for_classes(as_column(evaluation), as_column(evaluation, real=True))
    rows += [["ratio in the features of the judge", f"{evaluation['judge_frechet_ratio']:.2f}", "1"]]
    assert [row for row in rows if row not in cells_in("cifar10.md")] == []
    loaded = load(SHIPPED_CIFAR10)
    assert loaded.config.training["evaluation"] == [evaluation]
    assert (evaluation["weights_sha256"], evaluation["num_images"]) == (loaded.weights_sha256, 10_000)
    assert evaluation["options"]["guidance"] == asdict(loaded.config.guidance_of("dpmpp"))
    for name, network in evaluation["networks"].items():
        assert f"the {name} recognises {network['test_accuracy']:.2%}" in document


def test_table_of_letters_matches_its_evaluations_and_the_shipped_checkpoint() -> None:
    evaluations = [read_evaluation(RESULTS / f"letters/{name}.json") for name in ("dpmpp", "ddpm")]
    rows = []
    for evaluation, setting in zip(evaluations, ("`dpmpp`, 10 steps", "`ddpm`, 100 steps"), strict=True):
        rows.append([f"{evaluation['num_images']:,} letters", setting, "real letters"])
        rows += rows_for_classes(as_column(evaluation), as_column(evaluation, real=True))
    assert [row for row in cells_in("letters.md") if len(row) == 3 and row[0] and set(row[0]) != {"-"}] == rows
    real = [evaluations[0][name]["accuracy"] for name in ("real_judge", "real_extractor")]
    document = (DOCS / "letters.md").read_text("utf-8")
    assert "the judge recognises {:.2%} and the extractor {:.2%}".format(*real) in document
    loaded = load(SHIPPED_LETTERS)
    assert loaded.config.training["evaluation"] == evaluations
    for evaluation in evaluations:
        sampler, guidance = evaluation["options"]["sampler"], evaluation["options"]["guidance"]
        assert evaluation["weights_sha256"] == loaded.weights_sha256
        assert guidance == asdict(loaded.config.guidance_of(sampler))
        stated = f"scale {guidance['scale']:g} at t = {guidance['start']} to {guidance['stop']} for `{sampler}`"
        assert stated in document
    letters = evaluations[0]
    assert (letters["num_images"], letters["judge"]["accuracy"] >= 0.98) == (9_984, True)
    assert min(letters["judge"]["per_class"]) >= 0.94
    assert letters["frechet_ratio"] <= 2
