"""Which treatments are measured: those that there is something for; asked for by name, the others are refused."""

import pytest
import torch

import toys
from masked import ME, model_of
from melayer.errors import InputError
from melayer.interventions.mask import WeMask
from melayer.measurements.criterion import Criterion
from melayer.model.subject import Subject
from melayer.quantisation.check import Check
from melayer.quantisation.choices import Choices
from melayer.quantisation.massive import Emergence
from melayer.quantisation.plan import MaskOptions, planned
from melayer.quantisation.sequences import check_sequences
from melayer.quantisation.treatments import TREATMENTS
from melayer.runs.progress import Bar

OPTIONS = MaskOptions(rate=0.25, selector="weight", strength=0.5, layers=None, seed=3)
MASSIVE = WeMask(me_layer=ME, massive_above=100.0, positions="massive")


def check_of(model, prefix=(toys.X,)):
    subject = Subject.of(model, toys.tokenizer())
    texts = [toys.text(40, x_at=None, seed=seed) for seed in range(2)]
    sequences = check_sequences(subject, prefix, texts, None, T=12, n=2)
    return Check(subject, (), sequences, Criterion(), 2048, Bar(None, 0))


@pytest.fixture(scope="module")
def check():
    return check_of(model_of("llama"))


@pytest.fixture(scope="module")
def without_prefix():
    return check_of(model_of("llama"), prefix=())


def plan_of(check, treatments=None, me_layer=ME, mask=None, options=OPTIONS):
    emerged = Emergence(me_layer, 123.0, torch.zeros(2, 12, dtype=torch.bool))
    return planned(check, Choices.of(["int8"], ["per-token"], treatments), emerged, mask, options)


def test_all_with_the_mask_that_the_options_describe(check):
    plan = plan_of(check)
    assert (plan.treatments, plan.notes) == (TREATMENTS, ())
    mask, info = plan.active_mask, check.subject.info
    assert (mask.rate, mask.selector, mask.strength, mask.layers, mask.seed) == (0.25, "weight", 0.5, None, 3)
    assert (mask.me_layer, mask.massive_above, mask.positions) == (ME, 123.0, "first")
    assert mask.made_for.fingerprint == info.fingerprint
    assert [plan.mask_of(of) for of in TREATMENTS] == [None, None, mask, mask]


def test_a_mask_that_is_given_is_used_as_it_is(check):
    mask = WeMask(rate=1.0, me_layer=5, massive_above=1.0)
    plan = plan_of(check, mask=mask)
    assert plan.active_mask is mask
    assert plan_of(check, mask=mask, me_layer=None).treatments == TREATMENTS  # it needs no ME layer


def test_no_mask_where_no_treatment_has_one(check):
    plan = plan_of(check, ["plain", "baked"], mask=WeMask(me_layer=ME))
    assert plan.active_mask is None
    assert plan.treatments == ("plain", "baked")


@pytest.mark.parametrize(
    ("options", "left", "said"),
    [
        ({"me_layer": None}, ("plain", "baked"), "there is no ME layer in these texts, so there is nothing to mask"),
        ({"mask": MASSIVE}, ("plain", "baked", "mask"), "only a mask on first tokens can be baked"),
    ],
)
def test_what_there_is_nothing_for_is_left_out_with_a_note(check, options, left, said):
    plan = plan_of(check, **options)
    assert plan.treatments == left
    missing = [of for of in TREATMENTS if of not in left]
    assert plan.notes == tuple(f"Not measured: {of}, since {said}." for of in missing)
    with pytest.raises(InputError, match=rf"Treatment '{missing[0]}' cannot be measured: {said}".replace("+", r"\+")):
        plan_of(check, list(TREATMENTS), **options)


def test_without_a_prefix_nothing_is_baked(without_prefix):
    plan = plan_of(without_prefix)
    assert plan.treatments == ("plain", "mask")
    assert [note.split(",")[0] for note in plan.notes] == ["Not measured: baked", "Not measured: baked+mask"]
    assert "ask for one (--bos or --prefix)" in plan.notes[0]


def test_a_mask_that_does_not_fit_is_left_out_unless_it_was_asked_for():
    check = check_of(model_of("olmo2"))  # no norm before attention, whose gamma ranks dimensions
    plan = plan_of(check)
    assert (plan.treatments, plan.active_mask) == (("plain", "baked"), None)
    assert [note.startswith(f"Not measured: {of}, since selector 'weight' ranks") for note, of in
            zip(plan.notes, ("baked+mask", "mask"), strict=True)] == [True, True]  # fmt: skip
    layers = MaskOptions(0.5, "weight", 1.0, (5,), 0)
    for options in ({"treatments": ["mask"]}, {"options": layers}):
        with pytest.raises(InputError, match="selector 'weight' ranks dimensions by the gamma"):
            plan_of(check, **options)
    drawn = MaskOptions(0.5, "random", 1.0, None, 0)
    assert plan_of(check, options=drawn).treatments == TREATMENTS


def test_options_that_make_no_mask_are_refused(check):
    with pytest.raises(InputError, match="rate is 2.0; expected a share"):
        plan_of(check, options=MaskOptions(2.0, "weight", 1.0, None, 0))
    # Where no treatment has a mask, nobody asks what it would be.
    assert plan_of(check, ["plain"], options=MaskOptions(2.0, "weight", 1.0, None, 0)).active_mask is None


def test_nothing_stays_on_the_model(check):
    plan_of(check)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in check.subject.model.modules())
