"""Every choice that ships composes and passes the check; none of this imports torch."""

from itertools import product

import pytest

from depthany.config.check import check, plain
from depthany.config.launch import compose, groups_of

GROUPS = groups_of()
VERBS = ("train", "evaluate", "pseudo_label")


def test_the_groups_are_found() -> None:
    assert {"stage", "recipe", "model", "data", "labels", "augment", "experiment", "debug"} <= set(GROUPS)


@pytest.mark.parametrize("model", GROUPS["model"])
@pytest.mark.parametrize("recipe", GROUPS["recipe"])
@pytest.mark.parametrize("stage", GROUPS["stage"])
def test_every_stage_recipe_and_model(stage: str, recipe: str, model: str) -> None:
    cfg = compose("train", [f"stage={stage}", f"recipe={recipe}", f"model={model}"])
    check(cfg)
    assert stage in cfg.task._target_ and cfg.recipe.name == recipe
    assert cfg.model.input_size == cfg.augment.labelled.size == cfg.augment.unlabelled.size


@pytest.mark.parametrize("data", GROUPS["data"])
@pytest.mark.parametrize("stage", GROUPS["stage"])
def test_every_stage_data_and_labels(stage: str, data: str) -> None:
    for labels in GROUPS["labels"]:
        check(compose("train", [f"stage={stage}", f"data={data}", f"labels={labels}"]))


OTHERS = sorted(set(GROUPS) - {"stage", "recipe", "model", "data", "labels", "unlabelled", "dataset", "part"})


@pytest.mark.parametrize("number", range(max(len(GROUPS[group]) for group in OTHERS)))
@pytest.mark.parametrize("stage", GROUPS["stage"])
def test_every_other_choice(stage: str, number: int) -> None:
    """One choice of every group at a time; what cannot be used is told by name."""
    chosen = [f"{group}={GROUPS[group][number % len(GROUPS[group])]}" for group in OTHERS]
    check(compose("train", [f"stage={stage}", *chosen]))


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_with_every_stage_and_debug(experiment: str) -> None:
    for stage, debug in product(GROUPS["stage"], GROUPS["debug"]):
        check(compose("train", [f"stage={stage}", f"experiment={experiment}", f"debug={debug}"]))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("data", GROUPS["data"])
def test_every_verb_takes_every_data(verb: str, data: str) -> None:
    check(compose(verb, [f"data={data}", *(["stage=teacher"] if verb == "train" else [])]))


def test_the_recipes_are_the_papers() -> None:
    """V1: 1 : 2, L_ssi and L_feat equal; V2: pseudo-labels only, L_ssi : L_gm = 1 : 2, 10 % dropped."""
    first, second = (plain(compose("train", ["stage=student", f"recipe={recipe}"])) for recipe in ("v1", "v2"))
    assert (first["mix"]["labelled"], first["mix"]["unlabelled"]) == (1, 2)
    assert (second["mix"]["labelled"], second["mix"]["unlabelled"]) == (0, 1)
    weights = [{name: term["weight"] for name, term in cfg["loss"].items()} for cfg in (first, second)]
    assert weights[0]["feature"] == weights[0]["ssi"] > 0 == weights[0]["gradient"]
    assert weights[1]["gradient"] == 2 * weights[1]["ssi"] > 0
    assert (first["loss"]["ssi"]["drop"], second["loss"]["ssi"]["drop"]) == (0, 0.1)
    assert first["loss"]["feature"]["margin"] == 0.85
    teachers = [plain(compose("train", ["stage=teacher", f"recipe={recipe}"])) for recipe in ("v1", "v2")]
    assert [cfg["loss"]["gradient"]["weight"] for cfg in teachers] == [0, 2]
    for cfg in teachers:
        assert cfg["augment"]["labelled"] == cfg["augment"]["unlabelled"]
        assert cfg["augment"]["labelled"]["jitter"] == cfg["augment"]["labelled"]["cutmix"] == 0
