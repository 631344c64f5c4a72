"""The schema at a glance: every table, its constraints and the indexes that queries rely on.

Every row of a clinic belongs to a tenant. Timestamps are `timestamptz`; what is computed from the present time
asks the SQL function `clock()`. Rules that a constraint can state are stated here and not only in
code: one session per appointment, one live session per patient and per doctor, no overlapping
appointments of a doctor, no message numbered twice, no charge for a session that never began. Functions,
triggers, grants and `clock()` itself are in the migrations.

Records of what happened (conversion attempts, outbox events) are only added to, never changed. Their ids are
no foreign keys: the statement that writes them has just written what they name, which is never deleted, and
the checks would cost more than the row.
"""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSTZRANGE, ExcludeConstraint

metadata: Final = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

DUE: Final = "status = 'CONFIRMED' AND session_id IS NULL AND kind = 'consultation' AND parked_at IS NULL"
"""Which appointments wait for their session. The job, the gauge, the monitor and the partial index
share this text; an appointment is due once `starts_at` and `next_attempt_at` have passed."""

BACKLOG: Final = f"{DUE} AND starts_at <= clock()"
"""Which appointments should have had their session by now, those that wait for their next attempt included."""

LIVE: Final = "status IN ('waiting', 'connecting', 'active')"
"""Which sessions are live. Shared by the two unique indexes and every query that means it."""

BEGUN_AT: Final = "CASE kind WHEN 'text' THEN activated_at ELSE connected_at END"
"""Since when the units of a session run: a text session's once it is active, a call's once it is connected."""

PENDING_DELIVERY: Final = "dispatched_at IS NULL AND dead_at IS NULL"


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(), primary_key=True)


def _tenant(*, known: bool = True) -> Column[int]:
    """The tenant of a row. `known` when something else proves it, such as another reference of the row;
    each reference costs every insert a look."""
    return Column("tenant_id", BigInteger, *(() if known else [ForeignKey("tenants.id")]), nullable=False)


def _time(name: str, *, required: bool = False, default_now: bool = False) -> Column[Any]:
    default = text("clock()") if default_now else None
    return Column(name, DateTime(timezone=True), nullable=not (required or default_now), server_default=default)


def _within_tenant(column: str, table: str) -> ForeignKeyConstraint:
    """A reference to a row of the same tenant: another tenant's id cannot be stored."""
    return ForeignKeyConstraint(["tenant_id", column], [f"{table}.tenant_id", f"{table}.id"])


def _person(column: str) -> ForeignKeyConstraint:
    return _within_tenant(column, "users")


tenants = Table(
    "tenants",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    _time("created_at", default_now=True),
)

users = Table(
    "users",
    metadata,
    _id(),
    _tenant(known=False),
    Column("role", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("country", Text, nullable=False),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    _time("created_at", default_now=True),
    UniqueConstraint("tenant_id", "id"),
    CheckConstraint("role IN ('patient', 'doctor', 'operator', 'service')", name="role"),
)
Index("users_tenant_id_role_id_idx", users.c.tenant_id, users.c.role, users.c.id)

subscriptions = Table(
    "subscriptions",
    metadata,
    _id(),
    _tenant(),
    Column("patient_id", BigInteger, nullable=False),
    Column("plan", Text, nullable=False),
    _time("starts_at", required=True),
    _time("ends_at", required=True),
    # The balances of its accounts in the ledger, whose trigger alone changes them.
    Column("text_sessions_remaining", Integer, nullable=False),
    Column("voice_calls_remaining", Integer, nullable=False),
    Column("video_calls_remaining", Integer, nullable=False),
    _time("created_at", default_now=True),
    _person("patient_id"),
    # What it began with, kept by a trigger; the ledger has all that happened since.
    Column("text_sessions_granted", Integer, nullable=False),
    Column("voice_calls_granted", Integer, nullable=False),
    Column("video_calls_granted", Integer, nullable=False),
    CheckConstraint("starts_at < ends_at", name="period"),
    CheckConstraint(
        "text_sessions_remaining >= 0 AND voice_calls_remaining >= 0 AND video_calls_remaining >= 0",
        name="remaining",
    ),
    UniqueConstraint("tenant_id", "id"),
    # Consumed first in, first out.
    Index(None, "patient_id", "starts_at", "id"),
)

appointments = Table(
    "appointments",
    metadata,
    _id(),
    _tenant(),
    # Kinds that never get a session can be added beside consultations without ever being due.
    Column("kind", Text, nullable=False, server_default=text("'consultation'")),
    Column("patient_id", BigInteger, nullable=False),
    Column("doctor_id", BigInteger, nullable=False),
    # No CHECK: imports bring anything. The API validates, conversion judges.
    Column("modality", Text, nullable=False),
    Column("status", Text, nullable=False, server_default=text("'PENDING'")),
    _time("starts_at", required=True),
    _time("ends_at", required=True),
    _time("proposed_starts_at"),
    Column("reason", Text),
    Column("cancel_reason", Text),
    Column("session_id", BigInteger),
    Column("conversion_attempts", Integer, nullable=False, server_default=text("0")),
    Column("conversion_failures", Integer, nullable=False, server_default=text("0")),
    _time("next_attempt_at"),
    _time("parked_at"),
    _time("patient_present_at"),
    _time("doctor_present_at"),
    # When a legacy path closed it, which had no session. One that was imported as completed was paid for elsewhere.
    _time("closed_at"),
    # When somebody ended what a legacy path bills. Nothing is charged for it since.
    _time("ended_at"),
    # The correlation id and trace of whoever confirmed it, for the conversion that may follow weeks later.
    Column("carrier", JSONB, nullable=False, server_default=text("'{}'")),
    _time("created_at", default_now=True),
    _time("updated_at", default_now=True),
    _person("patient_id"),
    _person("doctor_id"),
    # The session of an appointment is the one that names it, and so of no other.
    ForeignKeyConstraint(["session_id", "id"], ["sessions.id", "sessions.appointment_id"], use_alter=True),
    CheckConstraint(
        "status IN ('PENDING', 'CONFIRMED', 'CANCELLED', 'EXPIRED', 'RESCHEDULE_PROPOSED',"
        " 'IN_PROGRESS', 'COMPLETED', 'NO_SHOW')",
        name="status",
    ),
    CheckConstraint("status <> 'IN_PROGRESS' OR session_id IS NOT NULL", name="in_progress_has_session"),
    Index(
        "appointments_due_idx",
        func.greatest(text("starts_at"), text("next_attempt_at")),
        "id",
        postgresql_where=text(DUE),
    ),
    # The backlog, which counts what waits for its next attempt too, and recovery.
    Index("appointments_backlog_idx", "starts_at", postgresql_where=text(DUE)),
    Index("appointments_parked_idx", "starts_at", postgresql_where=text("parked_at IS NOT NULL")),
    Index("appointments_pending_idx", "starts_at", postgresql_where=text("status = 'PENDING'")),
    UniqueConstraint("tenant_id", "id"),
    # Conversions leave dead entries at the head of the due index; vacuum them early.
    postgresql_with={"autovacuum_vacuum_scale_factor": "0.01"},
)

# Whose appointments these are: what lists by person. Indexes of `appointments` itself would be written again by
# each conversion, on a page of their own for each person. Filled by a trigger.
appointment_parties = Table(
    "appointment_parties",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("appointment_id", BigInteger, ForeignKey("appointments.id"), primary_key=True, autoincrement=False),
)

busy_intervals = Table(
    "busy_intervals",
    metadata,
    _id(),
    _tenant(),
    Column("doctor_id", BigInteger, nullable=False),
    Column("appointment_id", BigInteger, nullable=False),
    Column("phase", Text, nullable=False, server_default=text("'full'")),
    Column("during", TSTZRANGE, nullable=False),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    _within_tenant("appointment_id", "appointments"),
    # int8range stands in for "=", which GiST knows for bigint only with an extension.
    ExcludeConstraint(
        (text("int8range(doctor_id, doctor_id, '[]')"), "&&"),
        ("during", "&&"),
        where=text("active"),
        name="busy_intervals_no_overlap",
    ),
    Index(None, "appointment_id"),
)

sessions = Table(
    "sessions",
    metadata,
    _id(),
    _tenant(),
    Column("kind", Text, nullable=False),
    Column("modality", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("appointment_id", BigInteger, unique=True),
    Column("patient_id", BigInteger, nullable=False),
    Column("doctor_id", BigInteger, nullable=False),
    Column("status", Text, nullable=False),
    _time("created_at", default_now=True),
    _time("response_deadline"),
    _time("expires_at", required=True),
    # What the patient said when starting it directly; an appointment has a reason of its own.
    Column("reason", Text),
    # Whose ring a call waits for the answer to.
    Column("rung_by", BigInteger),
    _time("rung_at"),
    # When it became active: the doctor's first message, or an answered call.
    _time("activated_at"),
    _time("connected_at"),
    # How many units the patient had left when they began to run; `expires_at` is when they are spent.
    Column("allowance_units", Integer),
    # When an active session ends unless a party does something.
    _time("idle_at"),
    # When an active session next needs the worker: a unit is full, the end is near, or it is over.
    _time("tick_at"),
    _time("warned_at"),
    _time("ended_at"),
    Column("ended_seq", BigInteger),
    Column("ended_by", BigInteger),
    Column("end_reason", Text),
    Column("units_charged", Integer, nullable=False, server_default=text("0")),
    _within_tenant("appointment_id", "appointments"),
    _person("patient_id"),
    _person("doctor_id"),
    CheckConstraint("kind IN ('text', 'call')", name="kind"),
    CheckConstraint(
        "modality IN ('text', 'voice', 'video') AND (kind = 'text') = (modality = 'text')", name="modality"
    ),
    CheckConstraint("source IN ('APPOINTMENT', 'DIRECT')", name="source"),
    CheckConstraint("(source = 'APPOINTMENT') = (appointment_id IS NOT NULL)", name="appointment"),
    CheckConstraint(
        "status IN ('waiting', 'active', 'ended', 'expired') AND kind = 'text'"
        " OR status IN ('connecting', 'active', 'ended', 'missed', 'declined') AND kind = 'call'",
        name="status",
    ),
    CheckConstraint(f"({LIVE}) = (ended_at IS NULL)", name="ended"),
    CheckConstraint("connected_at IS NULL OR kind = 'call' AND activated_at IS NOT NULL", name="connected"),
    CheckConstraint(f"{BEGUN_AT} IS NULL OR allowance_units >= 0 AND allowance_units IS NOT NULL", name="allowance"),
    CheckConstraint("status <> 'active' OR tick_at IS NOT NULL", name="tick"),
    CheckConstraint(f"units_charged = 0 OR {BEGUN_AT} IS NOT NULL", name="charged"),
    Index("sessions_live_patient_key", "patient_id", unique=True, postgresql_where=text(LIVE)),
    Index("sessions_live_doctor_key", "doctor_id", unique=True, postgresql_where=text(LIVE)),
    Index(
        "sessions_deadline_idx",
        func.least(text("response_deadline"), text("expires_at")),
        postgresql_where=text("status IN ('waiting', 'connecting')"),
    ),
    Index("sessions_tick_idx", "tick_at", postgresql_where=text("status = 'active'")),
    Index(None, "patient_id", "id"),
    Index(None, "doctor_id", "id"),
    UniqueConstraint("tenant_id", "id"),
    UniqueConstraint("id", "appointment_id"),
)

conversations = Table(
    "conversations",
    metadata,
    _id(),
    _tenant(),
    Column("appointment_id", BigInteger, unique=True),
    Column("session_id", BigInteger, unique=True),
    Column("last_seq", BigInteger, nullable=False, server_default=text("0")),
    # Counts the changes of reactions, as `last_seq` counts messages.
    Column("revision", BigInteger, nullable=False, server_default=text("0")),
    _time("created_at", default_now=True),
    _within_tenant("appointment_id", "appointments"),
    _within_tenant("session_id", "sessions"),
    UniqueConstraint("tenant_id", "id"),
    CheckConstraint("appointment_id IS NOT NULL OR session_id IS NOT NULL", name="owner"),
)

participants = Table(
    "participants",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("user_id", BigInteger, primary_key=True),
    _tenant(),
    Column("role", Text, nullable=False),
    Column("last_read_seq", BigInteger, nullable=False, server_default=text("0")),
    # When the sender would have sent all so far at the even pace of the rate limit (GCRA).
    _time("paced_at"),
    _within_tenant("conversation_id", "conversations"),
    _person("user_id"),
)

messages = Table(
    "messages",
    metadata,
    _id(),
    _tenant(),
    Column("conversation_id", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("sender_id", BigInteger, nullable=False),
    Column("client_message_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    # Readable, or sealed with the key that `key_id` names.
    Column("body", Text),
    Column("sealed_body", LargeBinary),
    Column("key_id", Text),
    Column("media_url", Text),
    Column("reply_to_seq", BigInteger),
    _time("sent_at", default_now=True),
    _within_tenant("conversation_id", "conversations"),
    ForeignKeyConstraint(["conversation_id", "sender_id"], ["participants.conversation_id", "participants.user_id"]),
    ForeignKeyConstraint(["conversation_id", "reply_to_seq"], ["messages.conversation_id", "messages.seq"]),
    UniqueConstraint("conversation_id", "seq"),
    UniqueConstraint("conversation_id", "client_message_id"),
    CheckConstraint("kind IN ('text', 'image', 'voice')", name="kind"),
    CheckConstraint("seq > 0", name="seq"),
    CheckConstraint(
        "(body IS NULL) = (sealed_body IS NOT NULL) AND (sealed_body IS NULL) = (key_id IS NULL)", name="body"
    ),
    CheckConstraint("reply_to_seq < seq", name="reply"),
)

reactions = Table(
    "reactions",
    metadata,
    Column("conversation_id", BigInteger, primary_key=True, autoincrement=False),
    Column("message_seq", BigInteger, primary_key=True),
    Column("user_id", BigInteger, primary_key=True),
    Column("emoji", Text, primary_key=True),
    # A reaction that was taken back stays as a row, so that whoever was away learns of it.
    Column("present", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
    ForeignKeyConstraint(["conversation_id", "message_seq"], ["messages.conversation_id", "messages.seq"]),
    ForeignKeyConstraint(["conversation_id", "user_id"], ["participants.conversation_id", "participants.user_id"]),
    CheckConstraint("char_length(emoji) BETWEEN 1 AND 32", name="emoji"),
    UniqueConstraint("conversation_id", "revision"),
)

socket_tickets = Table(
    "socket_tickets",
    metadata,
    # Of the ticket's secret, which is nowhere.
    Column("digest", LargeBinary, primary_key=True),
    _tenant(known=True),
    Column("user_id", BigInteger, nullable=False),
    Column("role", Text, nullable=False),
    Column("context", Text, nullable=False),
    _time("expires_at", required=True),
    # When the token that the ticket was issued for ends.
    _time("token_expires_at", required=True),
    _person("user_id"),
    Index(None, "expires_at"),
)

# Who serves sockets. A process that the others give up is deleted, and holds no slots any more.
api_processes = Table(
    "api_processes",
    metadata,
    Column("id", Uuid, primary_key=True),
    _time("seen_at", default_now=True),
)

# One row is one open socket. That a user has only so many is what the primary key is for.
socket_slots = Table(
    "socket_slots",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("slot", Integer, primary_key=True, autoincrement=False),
    _tenant(),
    Column("process_id", Uuid, ForeignKey("api_processes.id", ondelete="CASCADE"), nullable=False),
    Column("socket_id", Uuid, nullable=False),
    _person("user_id"),
    UniqueConstraint("process_id", "socket_id"),
)

payout_rates = Table(
    "payout_rates",
    metadata,
    # Of the doctor; `*` is every country that is not named.
    Column("country", Text, primary_key=True),
    Column("currency", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    CheckConstraint("currency ~ '^[A-Z]{3}$'", name="currency"),
    CheckConstraint("amount_minor > 0", name="amount"),
)

ledger_transactions = Table(
    "ledger_transactions",
    metadata,
    _id(),
    _tenant(),
    # What it is for, in words that only one transaction can have, such as `session:7:unit:2`.
    Column("idempotency_key", Text, nullable=False, unique=True),
    Column("kind", Text, nullable=False),
    Column("session_id", BigInteger),
    Column("appointment_id", BigInteger),
    Column("unit", Integer),
    Column("reverses", BigInteger, ForeignKey("ledger_transactions.id"), unique=True),
    _time("created_at", default_now=True),
    # Entries come in the database transaction that posts them, and never later.
    Column("posted_in", Text, nullable=False, server_default=text("pg_current_xact_id()::text")),
    _within_tenant("session_id", "sessions"),
    _within_tenant("appointment_id", "appointments"),
    CheckConstraint("kind IN ('charge', 'legacy', 'refund')", name="kind"),
    CheckConstraint("(kind = 'charge') <= (session_id IS NOT NULL AND unit > 0 AND unit IS NOT NULL)", name="charge"),
    CheckConstraint(
        "(kind = 'legacy') <= (appointment_id IS NOT NULL AND session_id IS NULL AND unit > 0 AND unit IS NOT NULL)",
        name="legacy",
    ),
    CheckConstraint("(kind = 'refund') = (reverses IS NOT NULL)", name="refund"),
    CheckConstraint("session_id IS NOT NULL OR appointment_id IS NOT NULL", name="subject"),
    Index(None, "session_id", "unit"),
    Index(None, "appointment_id", "unit"),
    UniqueConstraint("tenant_id", "id"),
)

ledger_entries = Table(
    "ledger_entries",
    metadata,
    _id(),
    _tenant(),
    Column("transaction_id", BigInteger, nullable=False),
    # An account is a kind with its owner, and has a balance per commodity: units of a modality, or a currency in
    # its minor unit. The clinic's own two have no stored balance, for which all its settlements would queue.
    Column("account", Text, nullable=False),
    Column("subscription_id", BigInteger),
    Column("doctor_id", BigInteger),
    Column("commodity", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    _within_tenant("transaction_id", "ledger_transactions"),
    _within_tenant("subscription_id", "subscriptions"),
    _person("doctor_id"),
    CheckConstraint("account IN ('subscription', 'consumed', 'wallet', 'payable')", name="account"),
    CheckConstraint("(account = 'subscription') = (subscription_id IS NOT NULL)", name="subscription"),
    CheckConstraint("(account = 'wallet') = (doctor_id IS NOT NULL)", name="wallet"),
    CheckConstraint(
        "CASE WHEN account IN ('subscription', 'consumed') THEN commodity IN ('text', 'voice', 'video')"
        " ELSE commodity ~ '^[A-Z]{3}$' END",
        name="commodity",
    ),
    CheckConstraint("amount <> 0", name="amount"),
    Index(None, "transaction_id"),
    Index(None, "subscription_id", postgresql_where=text("subscription_id IS NOT NULL")),
    Index(None, "doctor_id", "commodity", postgresql_where=text("doctor_id IS NOT NULL")),
)

wallets = Table(
    "wallets",
    metadata,
    Column("doctor_id", BigInteger, primary_key=True, autoincrement=False),
    Column("currency", Text, primary_key=True),
    _tenant(),
    # In the minor unit. The ledger's trigger alone changes it.
    Column("balance", BigInteger, nullable=False),
    _person("doctor_id"),
    CheckConstraint("balance >= 0", name="balance"),
)

conversion_runs = Table(
    "conversion_runs",
    metadata,
    Column("run_id", Uuid, primary_key=True),
    Column("task", Text, nullable=False),
    Column("worker", Text, nullable=False),
    # A run made outside a worker is added to the worker's counters once, by the gauge job.
    Column("counted", Boolean, nullable=False),
    _time("started_at", default_now=True),
    _time("finished_at"),
    Column("due_count", Integer, nullable=False),
    Column("created_count", Integer, nullable=False),
    Column("skipped_count", Integer, nullable=False),
    Column("failed_count", Integer, nullable=False),
    Column("runtime_ms", Float, nullable=False),
    CheckConstraint("task IN ('auto_start', 'recovery', 'legacy')", name="task"),
    Index("conversion_runs_uncounted_idx", "run_id", postgresql_where=text("NOT counted")),
)

conversion_attempts = Table(
    "conversion_attempts",
    metadata,
    _id(),
    _tenant(),
    Column("appointment_id", BigInteger, nullable=False),
    Column("run_id", Uuid, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("modality", Text, nullable=False),
    Column("result", Text, nullable=False),
    Column("reason", Text),
    Column("error_message", Text),
    Column("session_id", BigInteger),
    _time("started_at", default_now=True),
    Column("duration_ms", Float),
    CheckConstraint("result IN ('created', 'skipped', 'failed')", name="result"),
    CheckConstraint("(result = 'created') = (session_id IS NOT NULL)", name="session"),
    CheckConstraint("(result = 'created') = (reason IS NULL)", name="reason"),
    Index(None, "appointment_id", "id"),
    Index(None, "started_at", "result"),
)

conversion_samples = Table(
    "conversion_samples",
    metadata,
    # Start of a 15 s slot: whichever worker comes first writes it, the others find it written.
    Column("slot", DateTime(timezone=True), primary_key=True),
    Column("tenant_id", BigInteger, ForeignKey("tenants.id"), primary_key=True),
    Column("due_count", Integer, nullable=False),
    Column("needs_attention", Integer, nullable=False),
)

outbox_events = Table(
    "outbox_events",
    metadata,
    _id(),
    Column("event_id", Uuid, nullable=False, unique=True, server_default=text("gen_random_uuid()")),
    _tenant(),
    Column("name", Text, nullable=False),
    Column("schema_version", Integer, nullable=False, server_default=text("1")),
    Column("aggregate", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    _time("occurred_at", default_now=True),
    _time("created_at", default_now=True),
    Column("correlation_id", Text),
    Column("causation_id", Text),
    Column("trace_context", JSONB, nullable=False, server_default=text("'{}'")),
    # For the story of one appointment. Its session tells of the rest, and conversion writes no further index.
    Index(
        "outbox_events_appointment_idx",
        "aggregate",
        "id",
        postgresql_where=text("name NOT IN ('session_started', 'session_ended')"),
    ),
)

outbox_deliveries = Table(
    "outbox_deliveries",
    metadata,
    _id(),
    Column("event_id", BigInteger, ForeignKey("outbox_events.id"), nullable=False),
    Column("consumer", Text, nullable=False),
    Column("lane", Text, nullable=False),
    Column("aggregate", Text, nullable=False),
    _time("available_at", default_now=True),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    _time("lease_until"),
    Column("lease_token", Uuid),
    Column("last_error", Text),
    # Of the last attempt, where the consumer is a server that answers.
    Column("response_status", Integer),
    _time("dispatched_at"),
    _time("dead_at"),
    UniqueConstraint("event_id", "consumer"),
    CheckConstraint("dispatched_at IS NULL OR dead_at IS NULL", name="one_ending"),
    CheckConstraint("lane IN ('urgent', 'normal', 'webhooks')", name="lane"),
    Index("outbox_deliveries_pending_idx", "lane", "available_at", "id", postgresql_where=text(PENDING_DELIVERY)),
    Index(
        "outbox_deliveries_order_idx",
        "consumer",
        "aggregate",
        "id",
        postgresql_where=text(PENDING_DELIVERY),
    ),
    Index("outbox_deliveries_dead_idx", "dead_at", postgresql_where=text("dead_at IS NOT NULL")),
    # Each webhook is claimed on its own, and its operator lists what it got.
    Index(
        "outbox_deliveries_webhook_pending_idx",
        "consumer",
        "available_at",
        "id",
        postgresql_where=text(f"lane = 'webhooks' AND {PENDING_DELIVERY}"),
    ),
    Index("outbox_deliveries_webhook_idx", "consumer", "id", postgresql_where=text("lane = 'webhooks'")),
    postgresql_with={"autovacuum_vacuum_scale_factor": "0.01"},
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    _id(),
    _tenant(known=False),
    Column("url", Text, nullable=False),
    Column("description", Text),
    # The names of the events that it gets.
    Column("events", ARRAY(Text), nullable=False),
    _time("disabled_at"),
    Column("disabled_reason", Text),
    _time("created_at", default_now=True),
    UniqueConstraint("tenant_id", "url"),
    UniqueConstraint("tenant_id", "id"),
    CheckConstraint("disabled_reason IN ('operator', 'gone')", name="disabled_reason"),
    CheckConstraint("(disabled_at IS NULL) = (disabled_reason IS NULL)", name="disabled"),
)

webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    _id(),
    _tenant(),
    Column("endpoint_id", BigInteger, nullable=False),
    # In clear, or sealed with the key that `key_id` names.
    Column("secret", LargeBinary, nullable=False),
    Column("key_id", Text),
    _time("created_at", default_now=True),
    # A secret that was replaced goes on signing until then.
    _time("expires_at"),
    _within_tenant("endpoint_id", "webhook_endpoints"),
    Index("webhook_secrets_current_key", "endpoint_id", unique=True, postgresql_where=text("expires_at IS NULL")),
    Index(None, "endpoint_id"),
)

notifications = Table(
    "notifications",
    metadata,
    _id(),
    _tenant(),
    Column("user_id", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("appointment_id", BigInteger),
    Column("session_id", BigInteger),
    Column("event_id", Uuid, nullable=False),
    _time("created_at", default_now=True),
    _time("read_at"),
    _within_tenant("appointment_id", "appointments"),
    _within_tenant("session_id", "sessions"),
    _person("user_id"),
    UniqueConstraint("user_id", "event_id", "kind"),
    Index(
        "notifications_session_started_key",
        "user_id",
        "appointment_id",
        "session_id",
        unique=True,
        postgresql_where=text("kind = 'session_started'"),
    ),
    Index(None, "user_id", "id"),
)

workers = Table(
    "workers",
    metadata,
    Column("name", Text, primary_key=True),
    _time("started_at", default_now=True),
    _time("beat_at", default_now=True),
)

# What workers do by the clock: whichever of them comes first in a slot writes it down, and does it.
cron_runs = Table(
    "cron_runs",
    metadata,
    Column("name", Text, primary_key=True),
    Column("slot", DateTime(timezone=True), primary_key=True),
)

# The last audit of a worker: how many rows violate each invariant.
audits = Table(
    "audits",
    metadata,
    Column("checked_at", DateTime(timezone=True), primary_key=True),
    Column("violations", JSONB, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("user_id", BigInteger, primary_key=True, autoincrement=False),
    Column("operation", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    _tenant(),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("status", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    _time("created_at", default_now=True),
    _person("user_id"),
    CheckConstraint("status BETWEEN 200 AND 299", name="status"),
    Index(None, "created_at"),
)

audit_log = Table(
    "audit_log",
    metadata,
    _id(),
    # None for what concerns all tenants.
    Column("tenant_id", BigInteger, ForeignKey("tenants.id")),
    Column("actor_id", BigInteger),
    Column("action", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Column("correlation_id", Text),
    _time("at", default_now=True),
    Index(None, "tenant_id", "id"),
)

flag_overrides = Table(
    "flag_overrides",
    metadata,
    _id(),
    Column("flag", Text, nullable=False),
    # None for all tenants that have none of their own.
    Column("tenant_id", BigInteger, ForeignKey("tenants.id")),
    Column("target", JSONB, nullable=False),
    # The share of refusals at which the flag goes back to false, and since when they are counted.
    Column("tripwire", JSONB),
    _time("changed_at", default_now=True),
    UniqueConstraint("flag", "tenant_id", postgresql_nulls_not_distinct=True),
)

decisions = Table(
    "decisions",
    metadata,
    _id(),
    _tenant(known=False),
    _time("at", required=True),
    Column("operation", Text, nullable=False),
    Column("identifier", Text, nullable=False),
    Column("appointment_id", BigInteger),
    Column("session_id", BigInteger),
    Column("user_id", BigInteger, nullable=False),
    Column("role", Text, nullable=False),
    # The family of the client, such as `okhttp`: the first word of its User-Agent.
    Column("client", Text, nullable=False),
    Column("verdict", Text, nullable=False),
    Column("reason", Text),
    Column("flag", Text),
    Column("flags", JSONB, nullable=False),
    Column("correlation_id", Text),
    CheckConstraint("verdict IN ('allowed', 'warned', 'refused')", name="verdict"),
    Index(None, "at"),
    Index(None, "tenant_id", "id"),
    Index(None, "appointment_id", "id"),
    Index(None, "session_id", "id"),
)

decision_totals = Table(
    "decision_totals",
    metadata,
    # All decisions of a minute, of which `decisions` keeps the noteworthy ones.
    Column("minute", DateTime(timezone=True), primary_key=True),
    Column("tenant_id", BigInteger, ForeignKey("tenants.id"), primary_key=True, autoincrement=False),
    Column("operation", Text, primary_key=True),
    Column("verdict", Text, primary_key=True),
    # Of the flag that decided; empty when none did.
    Column("flag", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
)

# Of the platform and not of a clinic, whoever watches it; one row is one time that an alert fired.
alerts = Table(
    "alerts",
    metadata,
    _id(),
    Column("source", Text, nullable=False),
    # Which alert it is, in the words of its source; each time it fires, it starts anew.
    Column("fingerprint", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("component", Text),
    Column("metric", Text),
    Column("value", Float),
    Column("threshold", Float),
    Column("labels", JSONB, nullable=False),
    Column("annotations", JSONB, nullable=False),
    _time("started_at", required=True),
    _time("resolved_at"),
    _time("last_seen_at", default_now=True),
    # How often it was told, and how often that it is over.
    Column("deliveries", Integer, nullable=False),
    Column("resolutions", Integer, nullable=False),
    UniqueConstraint("source", "fingerprint", "started_at"),
    CheckConstraint("severity IN ('info', 'warning', 'high', 'critical')", name="severity"),
    CheckConstraint("resolved_at >= started_at", name="period"),
    CheckConstraint("(resolutions > 0) = (resolved_at IS NOT NULL) AND resolutions <= deliveries", name="resolutions"),
    Index("alerts_firing_idx", "id", postgresql_where=text("resolved_at IS NULL")),
    Index(None, "resolved_at"),
)

log_lines = Table(
    "log_lines",
    metadata,
    _id(),
    # By the clock of the process that wrote the line.
    _time("at", required=True),
    Column("level", Text, nullable=False),
    # WARNING and above, which the others do not displace.
    Column("urgent", Boolean, nullable=False),
    Column("event", Text, nullable=False),
    Column("category", Text),
    Column("component", Text),
    Column("service", Text, nullable=False),
    Column("correlation_id", Text),
    Column("user_id", BigInteger),
    Column("session_id", BigInteger),
    Column("tenant_id", BigInteger),
    # JSON, letter by letter as in the log: what is masked there, and what no JSON type of PostgreSQL takes.
    Column("line", Text, nullable=False),
    Index(None, "at"),
    Index(None, "urgent", "id"),
    Index(None, "correlation_id"),
)
