"""The SQL of sending, in its two forms: to a session, and to an appointment that has none yet.

Both number the message from the conversation's own counter in the statement that stores it, so the
numbers have no gaps, and both insert plainly: `ON CONFLICT` would burn a number.
"""

from typing import Final

from libs.domain.sessions.facts import SESSION_COLUMNS

# $1 id, $2 tenant id, $3 user id, $4 role, $5 client message id, $6 kind of message, $7 body, $8 media url.
_SEND: Final = """
    WITH target AS MATERIALIZED ({target}),
    caller AS (
        SELECT EXISTS (
            SELECT FROM users WHERE tenant_id = $2 AND id = $3 AND role = $4 AND active
        ) AS caller_active
    ),
    duplicate AS (
        SELECT m.id, m.seq, m.sent_at,
            m.sender_id = t.participant_id AND m.kind = $6 AND m.body = $7
                AND m.media_url IS NOT DISTINCT FROM $8 AS same
        FROM target t JOIN messages m ON m.conversation_id = t.conversation_id
        WHERE m.client_message_id = $5
    ),
    numbered AS (
        UPDATE conversations c SET last_seq = c.last_seq + 1
        FROM target t, caller
        WHERE c.id = t.conversation_id AND t.participant_id IS NOT NULL AND caller.caller_active AND {passes}
          AND NOT EXISTS (SELECT FROM duplicate)
        RETURNING c.last_seq AS seq
    ),
    stored AS (
        INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body, media_url)
        SELECT $2, t.conversation_id, n.seq, t.participant_id, $5, $6, $7, $8
        FROM target t, numbered n
        RETURNING id, seq, sent_at
    ),
    moved AS ({moved})
    SELECT caller.caller_active, t.*, coalesce(n.id, d.id) AS message_id, coalesce(n.seq, d.seq) AS seq,
           coalesce(n.sent_at, d.sent_at) AS sent_at, d.id IS NOT NULL AS repeated, d.same,
           coalesce(moved.status = 'active', false) AS activated
    FROM caller
    LEFT JOIN target t ON true LEFT JOIN stored n ON true LEFT JOIN duplicate d ON true LEFT JOIN moved ON true
"""

SEND_BY_SESSION: Final = _SEND.format(
    target=f"""
        SELECT {SESSION_COLUMNS}, s.response_deadline, p.user_id AS participant_id
        FROM sessions s
        JOIN conversations c ON c.session_id = s.id
        LEFT JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3
        WHERE s.id = $1 AND s.kind = $9 AND s.tenant_id = $2
        FOR NO KEY UPDATE OF s
    """,
    passes="t.session_status = ANY ($10::text[]) AND NOT t.overdue",
    # The doctor's first message activates a text session; the patient's first starts the doctor's clock, once.
    moved="""
        UPDATE sessions s
        SET status = CASE WHEN $3 = t.doctor_id THEN 'active' ELSE s.status END,
            activated_at = CASE WHEN $3 = t.doctor_id THEN clock() END,
            response_deadline = CASE WHEN $3 = t.doctor_id THEN s.response_deadline ELSE clock() + $11::interval END
        FROM target t, numbered
        WHERE s.id = t.session_id AND t.kind = 'text' AND t.session_status = 'waiting'
          AND ($3 = t.doctor_id OR t.response_deadline IS NULL)
        RETURNING s.status
    """,
)
"""The eight parameters above, then $9 kind of session, $10 states that pass, $11 response window."""

JOIN_BY_APPOINTMENT: Final = """
    WITH conversation AS (
        INSERT INTO conversations (tenant_id, appointment_id) VALUES ($2, $1)
        ON CONFLICT (appointment_id) DO UPDATE SET appointment_id = excluded.appointment_id
        RETURNING id
    )
    INSERT INTO participants (tenant_id, conversation_id, user_id, role) SELECT $2, id, $3, $4 FROM conversation
    ON CONFLICT (conversation_id, user_id) DO NOTHING
"""
"""$1 appointment id, $2 tenant id, $3 user id, $4 role."""

SEND_BY_APPOINTMENT: Final = _SEND.format(
    target="""
        SELECT c.id AS conversation_id, p.user_id AS participant_id
        FROM conversations c JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3
        WHERE c.appointment_id = $1
    """,
    passes="true",
    moved="SELECT NULL::text AS status",
)
"""The eight parameters above; the transaction holds the appointment's row and has joined."""
