"""Whom a flag is on for, as a pure function of what is said of it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.guardrails import Flag, Flags, Origin, Override, Rollout, Target, Tripwire
from libs.guardrails.context import MAX_ID
from libs.guardrails.flags import position

CHAT = Flag.ENFORCE_SESSION_GATED_CHAT
BILLING = Flag.ENFORCE_SESSION_GATED_BILLING
TRIGGERS = Flag.DISABLE_LEGACY_APPOINTMENT_TRIGGERS
LENIENT = Flag.ALLOW_LEGACY_APPOINTMENT_CHAT

flags = st.sampled_from(Flag)
ids = st.integers(1, MAX_ID)
shares = st.floats(0, 1)
answers = st.sampled_from([True, False, None])
lists = st.frozensets(st.integers(1, 50), max_size=5)
targets = st.builds(
    lambda default, share, allowed: Target(default, share, {"tenant": allowed} if allowed else {}),
    answers,
    st.none() | shares,
    lists,
)


def rollout(*overrides: Override, on: Flag | None = None) -> Rollout:
    """With one flag on in the environment, or none."""
    return Rollout.of(Flags(**({on.value.lower(): True} if on else {})), overrides)


def test_where_a_tenant_stands_is_the_same_for_ever() -> None:
    # Computed elsewhere: `printf ENFORCE_SESSION_GATED_CHAT:7 | sha256sum`, the first twelve digits.
    assert position(CHAT, 7) == 0x682E51DA6DAA / 2**48
    assert position(BILLING, 7) == 0x2EA1DDC8AC73 / 2**48
    assert position(CHAT, MAX_ID) == 0xB043D38FBDFA / 2**48


@given(flags, ids)
def test_everybody_stands_from_0_to_just_below_1(flag: Flag, tenant_id: int) -> None:
    assert 0 <= position(flag, tenant_id) < 1
    assert not Target(share=0.0).reaches(flag, tenant_id)
    assert Target(share=1.0).reaches(flag, tenant_id)


@given(flags, ids, shares, shares)
def test_a_tenant_who_is_reached_stays_reached_while_the_share_grows(
    flag: Flag, tenant_id: int, one: float, other: float
) -> None:
    smaller, larger = sorted((one, other))
    if Target(share=smaller).reaches(flag, tenant_id):
        assert Target(share=larger).reaches(flag, tenant_id)


@given(flags, st.integers(1, 10**12), st.sampled_from([0.05, 0.25, 0.5, 0.9]))
def test_a_share_reaches_about_that_share(flag: Flag, first: int, share: float) -> None:
    reached = sum(Target(share=share).reaches(flag, first + number) for number in range(2000))
    assert abs(reached / 2000 - share) < 0.07  # more than six standard deviations


def test_the_first_tenants_of_one_flag_are_not_those_of_another() -> None:
    first = {flag: {tenant for tenant in range(1000) if position(flag, tenant) < 0.1} for flag in Flag}
    for flag in Flag:
        for other in set(Flag) - {flag}:
            assert len(first[flag] & first[other]) < 40


@given(flags, ids, st.none() | targets, st.none() | st.booleans(), st.none() | flags)
def test_the_own_override_counts_before_the_list_the_share_the_default_and_the_environment(
    flag: Flag, tenant_id: int, everyone: Target | None, own: bool | None, environment: Flag | None
) -> None:
    said = [Override(flag, None, everyone)] if everyone else []
    said += [Override(flag, tenant_id, Target(own))] if own is not None else []
    state = rollout(*said, on=environment)

    value = state.value(flag, tenant_id)

    if own is not None:
        expected: tuple[bool, Origin] = own, Origin.TENANT
    elif everyone and everyone.allows(tenant_id):
        expected = True, Origin.ALLOW
    elif everyone and everyone.reaches(flag, tenant_id):
        expected = True, Origin.SHARE
    elif everyone and everyone.default is not None:
        expected = everyone.default, Origin.EVERYONE
    else:
        expected = flag is environment, Origin.ENVIRONMENT
    assert (value.enabled, value.origin) == expected
    assert (value.override is None) == (value.origin is Origin.ENVIRONMENT)
    assert state.for_tenant(tenant_id)[flag] is value.enabled
    for other in set(Flag) - {flag}:
        assert state.for_tenant(tenant_id)[other] is (other is environment)


def test_without_a_tenant_the_default_counts_and_neither_list_nor_share() -> None:
    staged = Target(None, 1.0, {"tenant": frozenset({1})})
    assert rollout(Override(CHAT, None, staged)).value(CHAT, None).enabled is False
    assert rollout(Override(CHAT, None, staged), on=CHAT).value(CHAT, None).enabled is True
    assert rollout(Override(CHAT, None, Target(True))).value(CHAT, None).enabled is True
    assert rollout(Override(CHAT, 1, Target(True))).value(CHAT, None).enabled is False


@given(targets)
def test_a_target_is_read_as_it_was_written(target: Target) -> None:
    assert Target.of_json(target.as_json()) == target


def test_a_target_of_a_later_version_is_read_too() -> None:
    later = {"default": None, "allow": {"tenant": [3], "company": [9]}, "unless": {"moon": "full"}}
    target = Target.of_json(later)
    assert target.allows(3)
    assert not target.allows(9)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="a number from 0 to 1"):
        Target(share=share)


@given(flags, st.none() | st.integers(1, 50), targets, st.none() | flags)
def test_an_override_shadows_the_environment_when_it_changes_anything_for_anybody(
    flag: Flag, tenant_id: int | None, target: Target, environment: Flag | None
) -> None:
    target = Target(target.default) if tenant_id else target
    state = rollout(Override(flag, tenant_id, target), on=environment)
    people = range(1, 400)
    changed = any(state.value(flag, each).enabled is not (flag is environment) for each in people)
    if changed:
        assert state.shadowing()
    elif target.share in (None, 0):
        assert not state.shadowing()


@pytest.mark.parametrize(
    ("flag", "target", "tenant_id", "sentence"),
    [
        (TRIGGERS, Target(True), None, "refuses no requests"),
        (LENIENT, Target(True), 1, "refuses no requests"),
        (CHAT, Target(False), 1, "off has no tripwire"),
        (CHAT, Target(True, 0.5), 1, "One tenant has a flag on or off"),
    ],
)
def test_an_override_that_makes_no_sense_says_why(
    flag: Flag, target: Target, tenant_id: int | None, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        Override(flag, tenant_id, target, Tripwire())


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": -0.1}, {"minutes": 0}, {"minutes": 61}, {"minimum": 0}])
def test_a_tripwire_that_nothing_could_cross_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a tripwire has"):
        Tripwire(**wrong)


def test_a_tripwire_is_crossed_by_more_than_its_share_of_enough_requests() -> None:
    wire = Tripwire()
    assert not wire.is_crossed(50, 5)
    assert wire.is_crossed(50, 6)
    assert not wire.is_crossed(49, 49)
    assert not wire.is_crossed(1000, 100)
    assert not Tripwire(share=0).is_crossed(50, 0)
