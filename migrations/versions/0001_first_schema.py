"""The first schema: people, appointments, sessions, chat, conversion, outbox.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Every query takes the present time from here, so that tests can move it. STABLE and SQL: it is inlined.
CLOCK = "CREATE FUNCTION clock() RETURNS timestamptz LANGUAGE sql STABLE AS 'SELECT now()'"

STATUS_RULES = """
CREATE FUNCTION appointments_follow_transitions() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.status || '>' || NEW.status <> ALL (ARRAY[
            'PENDING>CANCELLED', 'PENDING>CONFIRMED', 'PENDING>EXPIRED',
            'CONFIRMED>CANCELLED', 'CONFIRMED>COMPLETED', 'CONFIRMED>IN_PROGRESS',
            'CONFIRMED>NO_SHOW', 'CONFIRMED>RESCHEDULE_PROPOSED', 'RESCHEDULE_PROPOSED>CANCELLED',
            'RESCHEDULE_PROPOSED>CONFIRMED', 'IN_PROGRESS>COMPLETED', 'IN_PROGRESS>NO_SHOW'
    ]) THEN
        RAISE EXCEPTION 'An appointment cannot go from % to %.', OLD.status, NEW.status
            USING ERRCODE = 'check_violation', CONSTRAINT = 'appointments_transition';
    END IF;
    IF NEW.status NOT IN (
            'CONFIRMED', 'IN_PROGRESS', 'PENDING',
            'RESCHEDULE_PROPOSED'
    ) THEN
        UPDATE busy_intervals SET active = false WHERE appointment_id = NEW.id AND active;
    END IF;
    RETURN NEW;
END $$
"""

STATUS_TRIGGER = """
CREATE TRIGGER appointments_follow_transitions BEFORE UPDATE OF status ON appointments
FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
EXECUTE FUNCTION appointments_follow_transitions()
"""

# The services' login role. It owns nothing, and may change only what the application changes.
ROLE = """
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'sessiongate_app') THEN
        CREATE ROLE sessiongate_app LOGIN;
    END IF;
    -- What frees rows after a process hangs or a request is cancelled; as role settings they also hold
    -- behind a connection pooler.
    ALTER ROLE sessiongate_app SET statement_timeout = '5s';
    ALTER ROLE sessiongate_app SET lock_timeout = '2s';
    ALTER ROLE sessiongate_app SET idle_in_transaction_session_timeout = '5s';
    ALTER ROLE sessiongate_app SET client_connection_check_interval = '1s';
    IF EXISTS (SELECT FROM pg_settings WHERE name = 'transaction_timeout') THEN
        ALTER ROLE sessiongate_app SET transaction_timeout = '15s';
    END IF;
END $$
"""

GRANTS = (
    "GRANT SELECT ON ALL TABLES IN SCHEMA public TO sessiongate_app",
    "GRANT INSERT, UPDATE ON tenants, users, subscriptions, appointments, busy_intervals, sessions, conversations,"
    " participants, conversion_runs, outbox_deliveries, notifications, workers TO sessiongate_app",
    "GRANT DELETE ON workers, conversion_samples, idempotency_keys TO sessiongate_app",
    # What has happened is not rewritten.
    "GRANT INSERT ON messages, conversion_attempts, conversion_samples, outbox_events, audit_log, idempotency_keys"
    " TO sessiongate_app",
)


def upgrade() -> None:
    op.execute(CLOCK)
    op.create_table(
        "conversion_runs",
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_count", sa.Integer(), nullable=False),
        sa.Column("created_count", sa.Integer(), nullable=False),
        sa.Column("skipped_count", sa.Integer(), nullable=False),
        sa.Column("failed_count", sa.Integer(), nullable=False),
        sa.Column("runtime_ms", sa.Float(), nullable=False),
        sa.CheckConstraint("task IN ('auto_start', 'recovery')", name=op.f("conversion_runs_task_check")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("conversion_runs_pkey")),
    )
    op.create_index(
        "conversion_runs_uncounted_idx",
        "conversion_runs",
        ["run_id"],
        unique=False,
        postgresql_where=sa.text("NOT counted"),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("tenants_pkey")),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("beat_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("workers_pkey")),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("actor_id", sa.BigInteger(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("details", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("audit_log_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("audit_log_pkey")),
    )
    op.create_index(op.f("audit_log_tenant_id_id_idx"), "audit_log", ["tenant_id", "id"], unique=False)
    op.create_table(
        "conversion_samples",
        sa.Column("slot", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("due_count", sa.Integer(), nullable=False),
        sa.Column("needs_attention", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("conversion_samples_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("slot", "tenant_id", name=op.f("conversion_samples_pkey")),
    )
    op.create_table(
        "outbox_events",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("event_id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("schema_version", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("aggregate", sa.Text(), nullable=False),
        sa.Column("payload", postgresql.JSONB(), nullable=False),
        sa.Column("occurred_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=True),
        sa.Column("causation_id", sa.Text(), nullable=True),
        sa.Column("trace_context", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("outbox_events_pkey")),
        sa.UniqueConstraint("event_id", name=op.f("outbox_events_event_id_key")),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("country", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint("role IN ('patient', 'doctor', 'operator', 'service')", name=op.f("users_role_check")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("users_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("users_pkey")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("users_tenant_id_id_key")),
    )
    op.create_index("users_tenant_id_role_id_idx", "users", ["tenant_id", "role", "id"], unique=False)
    op.create_table(
        "appointments",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), server_default=sa.text("'consultation'"), nullable=False),
        sa.Column("patient_id", sa.BigInteger(), nullable=False),
        sa.Column("doctor_id", sa.BigInteger(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), server_default=sa.text("'PENDING'"), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("proposed_starts_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("cancel_reason", sa.Text(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("conversion_attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("conversion_failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("parked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("patient_present_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("doctor_present_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("carrier", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint(
            "status <> 'IN_PROGRESS' OR session_id IS NOT NULL", name=op.f("appointments_in_progress_has_session_check")
        ),
        sa.CheckConstraint(
            "status IN ('PENDING', 'CONFIRMED', 'CANCELLED', 'EXPIRED', 'RESCHEDULE_PROPOSED', 'IN_PROGRESS', 'COMPLETED', 'NO_SHOW')",
            name=op.f("appointments_status_check"),
        ),
        sa.ForeignKeyConstraint(
            ["session_id", "id"],
            ["sessions.id", "sessions.appointment_id"],
            name=op.f("appointments_session_id_id_fkey"),
            use_alter=True,
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "doctor_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("appointments_tenant_id_doctor_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("appointments_tenant_id_patient_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("appointments_pkey")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("appointments_tenant_id_id_key")),
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.01"},
    )
    op.create_index(op.f("appointments_doctor_id_id_idx"), "appointments", ["doctor_id", "id"], unique=False)
    op.create_index(
        "appointments_backlog_idx",
        "appointments",
        ["starts_at"],
        unique=False,
        postgresql_where=sa.text(
            "status = 'CONFIRMED' AND session_id IS NULL AND kind = 'consultation' AND parked_at IS NULL"
        ),
    )
    op.create_index(
        "appointments_due_idx",
        "appointments",
        [sa.literal_column("greatest(starts_at, next_attempt_at)"), "id"],
        unique=False,
        postgresql_where=sa.text(
            "status = 'CONFIRMED' AND session_id IS NULL AND kind = 'consultation' AND parked_at IS NULL"
        ),
    )
    op.create_index(
        "appointments_parked_idx",
        "appointments",
        ["starts_at"],
        unique=False,
        postgresql_where=sa.text("parked_at IS NOT NULL"),
    )
    op.create_index(op.f("appointments_patient_id_id_idx"), "appointments", ["patient_id", "id"], unique=False)
    op.create_index(
        "appointments_pending_idx",
        "appointments",
        ["starts_at"],
        unique=False,
        postgresql_where=sa.text("status = 'PENDING'"),
    )
    op.create_table(
        "outbox_deliveries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("lane", sa.Text(), nullable=False),
        sa.Column("aggregate", sa.Text(), nullable=False),
        sa.Column("available_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.Uuid(), nullable=True),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.Column("dispatched_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("dead_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("lane IN ('urgent', 'normal')", name=op.f("outbox_deliveries_lane_check")),
        sa.CheckConstraint("dispatched_at IS NULL OR dead_at IS NULL", name=op.f("outbox_deliveries_one_ending_check")),
        sa.ForeignKeyConstraint(["event_id"], ["outbox_events.id"], name=op.f("outbox_deliveries_event_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("outbox_deliveries_pkey")),
        sa.UniqueConstraint("event_id", "consumer", name=op.f("outbox_deliveries_event_id_consumer_key")),
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.01"},
    )
    op.create_index(
        "outbox_deliveries_dead_idx",
        "outbox_deliveries",
        ["dead_at"],
        unique=False,
        postgresql_where=sa.text("dead_at IS NOT NULL"),
    )
    op.create_index(
        "outbox_deliveries_order_idx",
        "outbox_deliveries",
        ["consumer", "aggregate", "id"],
        unique=False,
        postgresql_where=sa.text("dispatched_at IS NULL AND dead_at IS NULL"),
    )
    op.create_index(
        "outbox_deliveries_pending_idx",
        "outbox_deliveries",
        ["lane", "available_at", "id"],
        unique=False,
        postgresql_where=sa.text("dispatched_at IS NULL AND dead_at IS NULL"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint("status BETWEEN 200 AND 299", name=op.f("idempotency_keys_status_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "user_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("idempotency_keys_tenant_id_user_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("user_id", "operation", "key", name=op.f("idempotency_keys_pkey")),
    )
    op.create_index(op.f("idempotency_keys_created_at_idx"), "idempotency_keys", ["created_at"], unique=False)
    op.create_table(
        "subscriptions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("patient_id", sa.BigInteger(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text_sessions_remaining", sa.Integer(), nullable=False),
        sa.Column("voice_calls_remaining", sa.Integer(), nullable=False),
        sa.Column("video_calls_remaining", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint("starts_at < ends_at", name=op.f("subscriptions_period_check")),
        sa.CheckConstraint(
            "text_sessions_remaining >= 0 AND voice_calls_remaining >= 0 AND video_calls_remaining >= 0",
            name=op.f("subscriptions_remaining_check"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("subscriptions_tenant_id_patient_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("subscriptions_pkey")),
    )
    op.create_index(
        op.f("subscriptions_patient_id_starts_at_id_idx"),
        "subscriptions",
        ["patient_id", "starts_at", "id"],
        unique=False,
    )
    op.create_table(
        "busy_intervals",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("doctor_id", sa.BigInteger(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=False),
        sa.Column("phase", sa.Text(), server_default=sa.text("'full'"), nullable=False),
        sa.Column("during", postgresql.TSTZRANGE(), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        postgresql.ExcludeConstraint(
            (sa.text("int8range(doctor_id, doctor_id, '[]')"), "&&"),
            (sa.column("during"), "&&"),
            where=sa.text("active"),
            using="gist",
            name="busy_intervals_no_overlap",
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "appointment_id"],
            ["appointments.tenant_id", "appointments.id"],
            name=op.f("busy_intervals_tenant_id_appointment_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("busy_intervals_pkey")),
    )
    op.create_index(op.f("busy_intervals_appointment_id_idx"), "busy_intervals", ["appointment_id"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=True),
        sa.Column("patient_id", sa.BigInteger(), nullable=False),
        sa.Column("doctor_id", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("response_deadline", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("activated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("connected_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_seq", sa.BigInteger(), nullable=True),
        sa.Column("ended_by", sa.BigInteger(), nullable=True),
        sa.Column("end_reason", sa.Text(), nullable=True),
        sa.Column("units_charged", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.CheckConstraint(
            "(source = 'APPOINTMENT') = (appointment_id IS NOT NULL)", name=op.f("sessions_appointment_check")
        ),
        sa.CheckConstraint(
            "(status IN ('waiting', 'connecting', 'active')) = (ended_at IS NULL)", name=op.f("sessions_ended_check")
        ),
        sa.CheckConstraint("kind IN ('text', 'call')", name=op.f("sessions_kind_check")),
        sa.CheckConstraint(
            "modality IN ('text', 'voice', 'video') AND (kind = 'text') = (modality = 'text')",
            name=op.f("sessions_modality_check"),
        ),
        sa.CheckConstraint("source IN ('APPOINTMENT', 'DIRECT')", name=op.f("sessions_source_check")),
        sa.CheckConstraint(
            "status IN ('waiting', 'active', 'ended', 'expired') AND kind = 'text' OR status IN ('connecting', 'active', 'ended', 'missed', 'declined') AND kind = 'call'",
            name=op.f("sessions_status_check"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "appointment_id"],
            ["appointments.tenant_id", "appointments.id"],
            name=op.f("sessions_tenant_id_appointment_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "doctor_id"], ["users.tenant_id", "users.id"], name=op.f("sessions_tenant_id_doctor_id_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "patient_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("sessions_tenant_id_patient_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("sessions_pkey")),
        sa.UniqueConstraint("appointment_id", name=op.f("sessions_appointment_id_key")),
        sa.UniqueConstraint("id", "appointment_id", name=op.f("sessions_id_appointment_id_key")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("sessions_tenant_id_id_key")),
    )
    op.create_index(
        "sessions_deadline_idx",
        "sessions",
        [sa.literal_column("least(response_deadline, expires_at)")],
        unique=False,
        postgresql_where=sa.text("status IN ('waiting', 'connecting')"),
    )
    op.create_index(op.f("sessions_doctor_id_id_idx"), "sessions", ["doctor_id", "id"], unique=False)
    op.create_index(
        "sessions_live_doctor_key",
        "sessions",
        ["doctor_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('waiting', 'connecting', 'active')"),
    )
    op.create_index(
        "sessions_live_patient_key",
        "sessions",
        ["patient_id"],
        unique=True,
        postgresql_where=sa.text("status IN ('waiting', 'connecting', 'active')"),
    )
    op.create_index(op.f("sessions_patient_id_id_idx"), "sessions", ["patient_id", "id"], unique=False)
    op.create_table(
        "conversations",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint(
            "appointment_id IS NOT NULL OR session_id IS NOT NULL", name=op.f("conversations_owner_check")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "appointment_id"],
            ["appointments.tenant_id", "appointments.id"],
            name=op.f("conversations_tenant_id_appointment_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"],
            ["sessions.tenant_id", "sessions.id"],
            name=op.f("conversations_tenant_id_session_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("conversations_pkey")),
        sa.UniqueConstraint("appointment_id", name=op.f("conversations_appointment_id_key")),
        sa.UniqueConstraint("session_id", name=op.f("conversations_session_id_key")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("conversations_tenant_id_id_key")),
    )
    op.create_table(
        "conversion_attempts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("duration_ms", sa.Float(), nullable=True),
        sa.CheckConstraint("(result = 'created') = (reason IS NULL)", name=op.f("conversion_attempts_reason_check")),
        sa.CheckConstraint(
            "(result = 'created') = (session_id IS NOT NULL)", name=op.f("conversion_attempts_session_check")
        ),
        sa.CheckConstraint("result IN ('created', 'skipped', 'failed')", name=op.f("conversion_attempts_result_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("conversion_attempts_pkey")),
    )
    op.create_index(
        op.f("conversion_attempts_appointment_id_id_idx"), "conversion_attempts", ["appointment_id", "id"], unique=False
    )
    op.create_index(
        op.f("conversion_attempts_started_at_result_idx"), "conversion_attempts", ["started_at", "result"], unique=False
    )
    op.create_table(
        "notifications",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "appointment_id"],
            ["appointments.tenant_id", "appointments.id"],
            name=op.f("notifications_tenant_id_appointment_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"],
            ["sessions.tenant_id", "sessions.id"],
            name=op.f("notifications_tenant_id_session_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "user_id"], ["users.tenant_id", "users.id"], name=op.f("notifications_tenant_id_user_id_fkey")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("notifications_pkey")),
        sa.UniqueConstraint("user_id", "event_id", "kind", name=op.f("notifications_user_id_event_id_kind_key")),
    )
    op.create_index(
        "notifications_session_started_key",
        "notifications",
        ["user_id", "appointment_id", "session_id"],
        unique=True,
        postgresql_where=sa.text("kind = 'session_started'"),
    )
    op.create_index(op.f("notifications_user_id_id_idx"), "notifications", ["user_id", "id"], unique=False)
    op.create_table(
        "participants",
        sa.Column("conversation_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "conversation_id"],
            ["conversations.tenant_id", "conversations.id"],
            name=op.f("participants_tenant_id_conversation_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "user_id"], ["users.tenant_id", "users.id"], name=op.f("participants_tenant_id_user_id_fkey")
        ),
        sa.PrimaryKeyConstraint("conversation_id", "user_id", name=op.f("participants_pkey")),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("conversation_id", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("sender_id", sa.BigInteger(), nullable=False),
        sa.Column("client_message_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("media_url", sa.Text(), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint("kind IN ('text', 'image', 'voice')", name=op.f("messages_kind_check")),
        sa.CheckConstraint("seq > 0", name=op.f("messages_seq_check")),
        sa.ForeignKeyConstraint(
            ["conversation_id", "sender_id"],
            ["participants.conversation_id", "participants.user_id"],
            name=op.f("messages_conversation_id_sender_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "conversation_id"],
            ["conversations.tenant_id", "conversations.id"],
            name=op.f("messages_tenant_id_conversation_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("messages_pkey")),
        sa.UniqueConstraint(
            "conversation_id", "client_message_id", name=op.f("messages_conversation_id_client_message_id_key")
        ),
        sa.UniqueConstraint("conversation_id", "seq", name=op.f("messages_conversation_id_seq_key")),
    )
    # Appointments and sessions refer to each other.
    op.create_foreign_key(
        "appointments_session_id_id_fkey", "appointments", "sessions", ["session_id", "id"], ["id", "appointment_id"]
    )
    op.execute(STATUS_RULES)
    op.execute(STATUS_TRIGGER)
    op.execute(ROLE)
    for grant in GRANTS:
        op.execute(grant)


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
