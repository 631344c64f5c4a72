"""The SQL of sending, in three forms: to a session, to an appointment that has none yet, and for many messages at once.

All number the message from the conversation's own counter in the statement that stores it, so the
numbers have no gaps, and both insert plainly: `ON CONFLICT` would burn a number. Whatever keeps the message
from being stored, the row that is answered tells.

"""

from typing import Final

from libs.domain.billing.posting import UNIT_SQL, allowance
from libs.domain.sessions.facts import OVERDUE, SESSION_COLUMNS

# $1 id, $2 tenant id, $3 user id, $4 role, $5 client message id, $6 kind of message, $7 body, $8 sealed body,
# $9 key id, $10 media url, $11 id of the message replied to, $12 interval between messages at an even pace,
# $13 how much of that pace may be used up at once.
_IS_ACTIVE: Final = "EXISTS (SELECT FROM users WHERE tenant_id = $2 AND id = $3 AND role = $4 AND active)"

# The generic cell rate algorithm: a moment that each message moves on, and that may not get too far ahead.
_NEXT_PACE: Final = "greatest(p.paced_at, clock()) + $12::interval"
_IN_PACE: Final = f"{_NEXT_PACE} <= clock() + $13::interval"

_SEND: Final = f"""
    WITH target AS MATERIALIZED ({{target}}),
    caller AS (SELECT {_IS_ACTIVE} AS caller_active),
    duplicate AS (
        SELECT m.* FROM target t JOIN messages m ON m.conversation_id = t.conversation_id
        WHERE m.client_message_id = $5
    ),
    original AS (
        SELECT m.* FROM target t JOIN messages m ON m.conversation_id = t.conversation_id WHERE m.id = $11
    ),
    paced AS (
        UPDATE participants p SET paced_at = {_NEXT_PACE}
        FROM target t, caller
        WHERE p.conversation_id = t.conversation_id AND p.user_id = t.participant_id AND caller.caller_active
          AND {{passes}}
          AND NOT EXISTS (SELECT FROM duplicate) AND ($11::bigint IS NULL OR EXISTS (SELECT FROM original))
          AND {_IN_PACE}
        RETURNING p.conversation_id
    ),
    numbered AS (
        UPDATE conversations c SET last_seq = c.last_seq + 1
        FROM paced WHERE c.id = paced.conversation_id
        RETURNING c.last_seq AS seq
    ),
    stored AS (
        INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body, sealed_body,
                              key_id, media_url, reply_to_seq)
        SELECT $2, t.conversation_id, n.seq, t.participant_id, $5, $6, $7, $8, $9, $10, (SELECT seq FROM original)
        FROM target t, numbered n
        RETURNING id, seq, sent_at
    ),
    moved AS ({{moved}})
    SELECT caller.caller_active, t.*, n.id AS message_id, n.seq, n.sent_at, d.id AS duplicate_id,
           o.id AS original_id, o.seq AS original_seq, o.client_message_id AS original_client_message_id,
           o.body AS original_body, o.sealed_body AS original_sealed_body, o.key_id AS original_key_id,
           extract(epoch FROM greatest(t.paced_at, clock()) + $12::interval - $13::interval - clock())::float8
               AS paced_for,
           coalesce(moved.status = 'active', false) AS activated
    FROM caller
    LEFT JOIN target t ON true LEFT JOIN stored n ON true LEFT JOIN duplicate d ON true
    LEFT JOIN original o ON true LEFT JOIN moved ON true
"""

SEND_BY_SESSION: Final = _SEND.format(
    target=f"""
        SELECT {SESSION_COLUMNS}, s.response_deadline, p.user_id AS participant_id, p.paced_at
        FROM sessions s
        JOIN conversations c ON c.session_id = s.id
        LEFT JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3
        WHERE s.id = $1 AND s.kind = $14 AND s.tenant_id = $2
        FOR NO KEY UPDATE OF s
    """,
    passes="t.session_status = ANY ($15::text[]) AND NOT t.overdue",
    # The doctor's first message activates a text session; the patient's first starts the doctor's clock, once, which
    # runs no earlier than the appointment.
    moved=f"""
        UPDATE sessions s
        SET status = CASE WHEN $3 = t.doctor_id THEN 'active' ELSE s.status END,
            activated_at = CASE WHEN $3 = t.doctor_id THEN clock() END,
            allowance_units = CASE WHEN $3 = t.doctor_id THEN allowance.units END,
            expires_at = CASE WHEN $3 = t.doctor_id THEN clock() + allowance.units * {UNIT_SQL} ELSE s.expires_at END,
            tick_at = CASE WHEN $3 = t.doctor_id THEN clock() END,
            idle_at = CASE WHEN $3 = t.doctor_id THEN clock() + $17::interval END,
            response_deadline = CASE WHEN $3 = t.doctor_id THEN s.response_deadline ELSE
                greatest(clock(), (SELECT starts_at FROM appointments WHERE id = t.appointment_id)) + $16::interval END
        FROM target t CROSS JOIN numbered CROSS JOIN LATERAL (
            SELECT {allowance("t.patient_id", "'text'")} AS units
        ) AS allowance
        WHERE s.id = t.session_id AND t.kind = 'text' AND t.session_status = 'waiting'
          AND ($3 = t.doctor_id OR t.response_deadline IS NULL)
        RETURNING s.status
    """,
)
"""The parameters above, then $14 kind of session, $15 states that pass, $16 response window, $17 how long
both parties may be idle once it is active."""

CONVERSATION_OF_SESSION: Final = "SELECT id FROM conversations WHERE session_id = $1 AND tenant_id = $2"

SEND_BY_APPOINTMENT: Final = _SEND.format(
    target="""
        SELECT c.id AS conversation_id, p.user_id AS participant_id, p.paced_at
        FROM conversations c JOIN participants p ON p.conversation_id = c.id AND p.user_id = $3
        WHERE c.appointment_id = $1
    """,
    passes="true",
    moved="SELECT NULL::text AS status",
)
"""The parameters above; the transaction holds the appointment's row and the caller has entered."""

STORE: Final = f"""
    WITH target AS MATERIALIZED (
        SELECT new.*, found.*
        FROM (
            SELECT *
            FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[], $5::text[], $6::text[], $7::text[],
                        $8::text[], $9::bytea[], $10::text[], $11::text[])
                AS message (ref_id, ref_kind, tenant_id, user_id, role, client_message_id, message_kind,
                            body, sealed_body, key_id, media_url)
            -- Of a limit that it does not know PostgreSQL expects few rows, which is true, and plans once for all
            -- groups. For arrays alone it plans each time anew, which takes longer than all the rest.
            LIMIT $15
        ) AS new
        CROSS JOIN LATERAL (
            SELECT {SESSION_COLUMNS}
            FROM sessions s
            JOIN conversations c ON c.session_id = s.id
            JOIN participants p ON p.conversation_id = c.id AND p.user_id = new.user_id
            WHERE s.id = new.ref_id AND s.kind = new.ref_kind AND s.tenant_id = new.tenant_id
              AND s.status = ANY ($14::text[]) AND NOT {OVERDUE} AND NOT (s.kind = 'text' AND s.status = 'waiting')
              AND EXISTS (
                  SELECT FROM users u
                  WHERE u.tenant_id = new.tenant_id AND u.id = new.user_id AND u.role = new.role AND u.active
              )
              AND NOT EXISTS (
                  SELECT FROM messages m
                  WHERE m.conversation_id = c.id AND m.client_message_id = new.client_message_id
              )
              AND {_IN_PACE}
            FOR NO KEY UPDATE OF s, p, c SKIP LOCKED
        ) AS found
    ),
    paced AS (
        UPDATE participants p SET paced_at = {_NEXT_PACE}
        FROM target t
        WHERE p.conversation_id = t.conversation_id AND p.user_id = t.user_id
    ),
    numbered AS (
        UPDATE conversations c SET last_seq = c.last_seq + 1
        FROM target t
        WHERE c.id = t.conversation_id
        RETURNING t.*, c.last_seq AS seq
    ),
    stored AS (
        INSERT INTO messages (tenant_id, conversation_id, seq, sender_id, client_message_id, kind, body, sealed_body,
                              key_id, media_url)
        SELECT tenant_id, conversation_id, seq, user_id, client_message_id, message_kind, body, sealed_body,
               key_id, media_url
        FROM numbered
        RETURNING id, conversation_id, seq, sent_at
    )
    SELECT true AS caller_active, t.session_id, t.kind, t.session_status, t.patient_id, t.doctor_id, t.appointment_id,
           t.conversation_id, t.overdue, t.begun, n.id AS message_id, n.seq, n.sent_at, NULL::bigint AS duplicate_id,
           NULL::bigint AS original_id, false AS activated
    FROM target t JOIN stored n ON n.conversation_id = t.conversation_id
"""
"""Stores messages that answer none, in sessions whose state they do not change, under new ids: the rows are theirs,
with all columns that are read once a message is stored. A message is left out when anything at all is in its way, be it
somebody who works on the same session at this moment: no row is waited for, and `SEND_BY_SESSION` tells why.

Of each message, no two of which may be for one session: $1 id of the session, $2 its kind, $3 tenant id, $4 user id,
$5 role, $6 client message id, $7 kind of message, $8 body, $9 sealed body, $10 key id, $11 media url. Of all of them:
$12 and $13 as above, $14 states that pass, $15 how many they are."""
