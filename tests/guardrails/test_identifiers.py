import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.guardrails import AppointmentRef, Reason, Refused, SessionKind, SessionRef, parse_context
from libs.guardrails.context import MAX_ID

IDS = st.integers(min_value=1, max_value=MAX_ID)
SESSIONS = st.builds(SessionRef, st.sampled_from(SessionKind), IDS)


def spellings(ref: SessionRef | AppointmentRef) -> set[str]:
    """Every way in which a client may write `ref`."""
    if isinstance(ref, AppointmentRef):
        return {f"{ref.id}"}
    return {f"text_session_{ref.id}"} if ref.legacy else {f"{ref.kind.value}_session:{ref.id}"}


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("text_session:7", SessionRef(SessionKind.TEXT, 7)),
        ("call_session:7", SessionRef(SessionKind.CALL, 7)),
        ("text_session_7", SessionRef(SessionKind.TEXT, 7, legacy=True)),
        ("7", AppointmentRef(7)),
        ("text_session:9223372036854775807", SessionRef(SessionKind.TEXT, 2**63 - 1)),
        ("9223372036854775807", AppointmentRef(2**63 - 1)),
        ("1000000000000000000", AppointmentRef(10**18)),
    ],
)
def test_each_spelling_has_its_meaning(text: str, ref: SessionRef | AppointmentRef) -> None:
    assert parse_context(text) == ref


def test_the_legacy_spelling_is_normalised() -> None:
    assert str(parse_context("text_session_7")) == "text_session:7"


NUMBERS_THAT_ARE_NO_IDS = (
    *("", "0", "-1", "+7", "07", "7abc", "abc7", "1e3", "7.0", "1_000", "0x7", "7,8"),
    *("9223372036854775808", "9999999999999999999", "10000000000000000000", "9" * 100_000),
    *("７", "٧", "७", "²", "Ⅶ"),
    *(" 7", "7 ", "\t7", "7\n", "7\r\n", "7\u2028", "\u00a07", "\ufeff7", "7\x00", "\x007", "7\ud800"),
)


@pytest.mark.parametrize("prefix", ["", "text_session:", "call_session:", "text_session_"])
@pytest.mark.parametrize("number", NUMBERS_THAT_ARE_NO_IDS, ids=lambda text: ascii(text[:24]))
def test_what_is_no_id_is_refused_in_every_spelling(prefix: str, number: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_context(prefix + number)
    assert refused.value.reason is Reason.SESSION_CONTEXT_INVALID


@pytest.mark.parametrize(
    "text",
    [
        *("TEXT_SESSION:7", "Text_session:7", "text-session:7", "text_session;7", "text_session: 7", "text_session::7"),
        *("text_session:7:8", "text_session:7/messages", "text_sessions:7", "session:7", "xtext_session:7", ":7"),
        *("\ntext_session:7", " text_session:7", "text_session：7", "tехt_session:7", "text\u200b_session:7"),
        *("call_session_7", "direct_session_7", "direct_session:7", "direct_session_abc", "direct_session_"),
        *("appointment:7", "appointment_7", "voice_session:7", "video_session:7", "null", "None", "true"),
        "text_session:" * 100_000,
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_context(text)
    assert refused.value.reason is Reason.SESSION_CONTEXT_INVALID


def test_a_refusal_does_not_echo_the_identifier() -> None:
    with pytest.raises(Refused) as refused:
        parse_context("<script>")
    assert "script" not in f"{refused.value!r}{refused.value.detail}{refused.value.facts}"


@given(SESSIONS)
def test_a_session_reference_survives_being_written_and_read(ref: SessionRef) -> None:
    assert parse_context(str(ref)) == ref


@given(IDS)
def test_an_appointment_id_survives_being_written_and_read(number: int) -> None:
    assert parse_context(str(AppointmentRef(number))) == AppointmentRef(number)


@given(st.integers(min_value=MAX_ID + 1))
def test_an_id_that_the_database_cannot_hold_is_refused(number: int) -> None:
    for text in (f"text_session:{number}", f"call_session:{number}", f"text_session_{number}", f"{number}"):
        with pytest.raises(Refused) as refused:
            parse_context(text)
        assert refused.value.reason is Reason.SESSION_CONTEXT_INVALID


@st.composite
def near_misses(draw: st.DrawFn) -> str:
    """Something valid with one character replaced, inserted or lost."""
    text = draw(st.sampled_from(["text_session:7", "call_session:12", "text_session_7", "120", str(MAX_ID)]))
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.text(max_size=1)) + text[at + draw(st.integers(0, 1)) :]


@given(st.one_of(st.text(), near_misses(), st.from_regex(r"[a-z]{0,6}_?session[:_]?[0-9]{0,22}", fullmatch=True)))
def test_what_is_read_is_a_spelling_of_what_it_is_read_as_and_all_else_is_refused(text: str) -> None:
    refusal = None
    try:
        ref = parse_context(text)
    except Refused as refused:
        refusal = refused.reason
    if refusal is None:
        assert 1 <= ref.id <= MAX_ID
        assert text in spellings(ref)
    else:
        assert refusal is Reason.SESSION_CONTEXT_INVALID
