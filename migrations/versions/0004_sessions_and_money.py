"""Sessions that run and are paid for: calls, timers, the ledger, payouts.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# What a subscription began with, so that its balance can be told from the ledger at any time.
GRANTED = """
CREATE FUNCTION subscriptions_remember_what_was_granted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.text_sessions_granted := NEW.text_sessions_remaining;
    NEW.voice_calls_granted := NEW.voice_calls_remaining;
    NEW.video_calls_granted := NEW.video_calls_remaining;
    RETURN NEW;
END $$
"""
GRANTED_TRIGGER = """
CREATE TRIGGER subscriptions_remember_what_was_granted BEFORE INSERT ON subscriptions
FOR EACH ROW EXECUTE FUNCTION subscriptions_remember_what_was_granted()
"""

# Nobody is charged for a session whose units have not begun to run.
BEGUN = """
CREATE FUNCTION ledger_transactions_charge_what_has_begun() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM public.sessions
        WHERE id = NEW.session_id AND CASE kind WHEN 'text' THEN activated_at ELSE connected_at END IS NOT NULL
    ) THEN
        RAISE EXCEPTION 'Session % has not begun and cannot be charged.', NEW.session_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'ledger_transactions_begun';
    END IF;
    RETURN NEW;
END $$
"""
BEGUN_TRIGGER = """
CREATE TRIGGER ledger_transactions_charge_what_has_begun BEFORE INSERT ON ledger_transactions
FOR EACH ROW WHEN (NEW.kind = 'charge') EXECUTE FUNCTION ledger_transactions_charge_what_has_begun()
"""

# Runs as the owner, for this trigger alone: the services can post entries, and change no balance but by them.
# Here and below the tables are named in full, since a session's own temporary tables would come first.
APPLY = """
CREATE FUNCTION ledger_entries_apply() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF EXISTS (
        SELECT FROM posted JOIN ledger_transactions t ON t.id = posted.transaction_id
        WHERE t.posted_in <> pg_current_xact_id()::text
    ) THEN
        RAISE EXCEPTION 'A posted transaction takes no more entries.'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'ledger_entries_closed';
    END IF;
    -- Nor does a part of one come first: a check that waits for the end of the transaction can be had earlier.
    IF EXISTS (SELECT FROM posted GROUP BY transaction_id, commodity HAVING sum(amount) <> 0) THEN
        RAISE EXCEPTION 'Entries that are posted together do not sum to zero.'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'ledger_transactions_balance';
    END IF;
    UPDATE subscriptions s
    SET text_sessions_remaining = text_sessions_remaining + change.text,
        voice_calls_remaining = voice_calls_remaining + change.voice,
        video_calls_remaining = video_calls_remaining + change.video
    FROM (
        SELECT subscription_id, coalesce(sum(amount) FILTER (WHERE commodity = 'text'), 0) AS text,
            coalesce(sum(amount) FILTER (WHERE commodity = 'voice'), 0) AS voice,
            coalesce(sum(amount) FILTER (WHERE commodity = 'video'), 0) AS video
        FROM posted WHERE account = 'subscription' GROUP BY subscription_id
    ) AS change
    WHERE s.id = change.subscription_id;
    INSERT INTO wallets (tenant_id, doctor_id, currency, balance)
    SELECT DISTINCT tenant_id, doctor_id, commodity, 0 FROM posted WHERE account = 'wallet'
    ORDER BY doctor_id, commodity
    ON CONFLICT DO NOTHING;
    UPDATE wallets w SET balance = balance + change.amount
    FROM (
        SELECT doctor_id, commodity, sum(amount) AS amount
        FROM posted WHERE account = 'wallet' GROUP BY doctor_id, commodity
    ) AS change
    WHERE w.doctor_id = change.doctor_id AND w.currency = change.commodity;
    RETURN NULL;
END $$
"""
APPLY_TRIGGER = """
CREATE TRIGGER ledger_entries_apply AFTER INSERT ON ledger_entries REFERENCING NEW TABLE AS posted
FOR EACH STATEMENT EXECUTE FUNCTION ledger_entries_apply()
"""

BALANCED = """
CREATE FUNCTION ledger_transactions_balance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM public.ledger_entries WHERE transaction_id = NEW.id)
        OR EXISTS (
            SELECT FROM public.ledger_entries WHERE transaction_id = NEW.id GROUP BY commodity HAVING sum(amount) <> 0
        )
    THEN
        RAISE EXCEPTION 'The entries of ledger transaction % do not sum to zero.', NEW.id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'ledger_transactions_balance';
    END IF;
    RETURN NULL;
END $$
"""
BALANCED_TRIGGER = """
CREATE CONSTRAINT TRIGGER ledger_transactions_balance AFTER INSERT ON ledger_transactions
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION ledger_transactions_balance()
"""

# Even the owner of the tables adds a correction instead of changing what was posted.
APPEND_ONLY = """
CREATE FUNCTION only_added_to() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'The table % is only added to.', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation', CONSTRAINT = TG_TABLE_NAME || '_only_added_to';
END $$
"""
APPEND_ONLY_TRIGGER = """
CREATE TRIGGER {table}_only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
FOR EACH STATEMENT EXECUTE FUNCTION only_added_to()
"""

_BEGUN_AT = "CASE kind WHEN 'text' THEN activated_at ELSE connected_at END"

# Nobody was told that the units of the sessions now running would cost something: they begin to run here.
RUNNING = f"""
UPDATE sessions s
SET activated_at = CASE WHEN kind = 'call' OR status <> 'active' THEN activated_at ELSE clock() END,
    connected_at = CASE WHEN connected_at IS NULL OR status <> 'active' THEN connected_at ELSE clock() END,
    allowance_units = CASE WHEN {_BEGUN_AT} IS NULL THEN NULL WHEN status <> 'active' THEN 0 ELSE (
        SELECT coalesce(sum(CASE s.modality WHEN 'text' THEN text_sessions_remaining
            WHEN 'voice' THEN voice_calls_remaining ELSE video_calls_remaining END), 0)
        FROM subscriptions u WHERE u.patient_id = s.patient_id AND u.starts_at <= clock() AND clock() < u.ends_at
    ) END,
    idle_at = CASE WHEN status = 'active' THEN clock() + interval '15 minutes' END,
    tick_at = CASE WHEN status = 'active' THEN clock() END
WHERE activated_at IS NOT NULL
"""
SPENT = f"""
UPDATE sessions SET expires_at = {_BEGUN_AT} + allowance_units * interval '10 minutes'
WHERE status = 'active' AND {_BEGUN_AT} IS NOT NULL
"""

RATES = "INSERT INTO payout_rates (country, currency, amount_minor) VALUES ('MW', 'MWK', 350000), ('*', 'USD', 300)"

GRANTS = (
    "GRANT SELECT ON payout_rates, ledger_transactions, ledger_entries, wallets TO sessiongate_app",
    "GRANT INSERT ON ledger_transactions, ledger_entries TO sessiongate_app",
    "GRANT SELECT, INSERT, DELETE ON cron_runs TO sessiongate_app",
    # What remains is the ledger's to say; that some column may be updated lets the services lock a row.
    "REVOKE UPDATE ON subscriptions FROM sessiongate_app",
    "GRANT UPDATE (plan, ends_at) ON subscriptions TO sessiongate_app",
    # Or a trigger of somebody's temporary table could call it.
    "REVOKE EXECUTE ON FUNCTION ledger_entries_apply() FROM PUBLIC",
)


def upgrade() -> None:
    # ### commands auto generated by Alembic - please adjust! ###
    op.create_unique_constraint(op.f("subscriptions_tenant_id_id_key"), "subscriptions", ["tenant_id", "id"])
    op.create_table(
        "payout_rates",
        sa.Column("country", sa.Text(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("currency ~ '^[A-Z]{3}$'", name=op.f("payout_rates_currency_check")),
        sa.CheckConstraint("amount_minor > 0", name=op.f("payout_rates_amount_check")),
        sa.PrimaryKeyConstraint("country", name=op.f("payout_rates_pkey")),
    )
    op.create_table(
        "wallets",
        sa.Column("doctor_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("balance", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("balance >= 0", name=op.f("wallets_balance_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "doctor_id"], ["users.tenant_id", "users.id"], name=op.f("wallets_tenant_id_doctor_id_fkey")
        ),
        sa.PrimaryKeyConstraint("doctor_id", "currency", name=op.f("wallets_pkey")),
    )
    op.create_table(
        "ledger_transactions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("appointment_id", sa.BigInteger(), nullable=True),
        sa.Column("unit", sa.Integer(), nullable=True),
        sa.Column("reverses", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("posted_in", sa.Text(), server_default=sa.text("pg_current_xact_id()::text"), nullable=False),
        sa.CheckConstraint(
            "(kind = 'charge') <= (session_id IS NOT NULL AND unit > 0 AND unit IS NOT NULL)",
            name=op.f("ledger_transactions_charge_check"),
        ),
        sa.CheckConstraint(
            "(kind = 'legacy') <= (appointment_id IS NOT NULL AND session_id IS NULL AND unit > 0 AND unit IS NOT NULL)",
            name=op.f("ledger_transactions_legacy_check"),
        ),
        sa.CheckConstraint("(kind = 'refund') = (reverses IS NOT NULL)", name=op.f("ledger_transactions_refund_check")),
        sa.CheckConstraint("kind IN ('charge', 'legacy', 'refund')", name=op.f("ledger_transactions_kind_check")),
        sa.CheckConstraint(
            "session_id IS NOT NULL OR appointment_id IS NOT NULL", name=op.f("ledger_transactions_subject_check")
        ),
        sa.ForeignKeyConstraint(
            ["reverses"], ["ledger_transactions.id"], name=op.f("ledger_transactions_reverses_fkey")
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "appointment_id"],
            ["appointments.tenant_id", "appointments.id"],
            name=op.f("ledger_transactions_tenant_id_appointment_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"],
            ["sessions.tenant_id", "sessions.id"],
            name=op.f("ledger_transactions_tenant_id_session_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("ledger_transactions_pkey")),
        sa.UniqueConstraint("idempotency_key", name=op.f("ledger_transactions_idempotency_key_key")),
        sa.UniqueConstraint("reverses", name=op.f("ledger_transactions_reverses_key")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("ledger_transactions_tenant_id_id_key")),
    )
    op.create_index(
        op.f("ledger_transactions_appointment_id_unit_idx"),
        "ledger_transactions",
        ["appointment_id", "unit"],
        unique=False,
    )
    op.create_index(
        op.f("ledger_transactions_session_id_unit_idx"), "ledger_transactions", ["session_id", "unit"], unique=False
    )
    op.create_table(
        "ledger_entries",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("transaction_id", sa.BigInteger(), nullable=False),
        sa.Column("account", sa.Text(), nullable=False),
        sa.Column("subscription_id", sa.BigInteger(), nullable=True),
        sa.Column("doctor_id", sa.BigInteger(), nullable=True),
        sa.Column("commodity", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(account = 'subscription') = (subscription_id IS NOT NULL)", name=op.f("ledger_entries_subscription_check")
        ),
        sa.CheckConstraint("(account = 'wallet') = (doctor_id IS NOT NULL)", name=op.f("ledger_entries_wallet_check")),
        sa.CheckConstraint(
            "CASE WHEN account IN ('subscription', 'consumed') THEN commodity IN ('text', 'voice', 'video') ELSE commodity ~ '^[A-Z]{3}$' END",
            name=op.f("ledger_entries_commodity_check"),
        ),
        sa.CheckConstraint(
            "account IN ('subscription', 'consumed', 'wallet', 'payable')", name=op.f("ledger_entries_account_check")
        ),
        sa.CheckConstraint("amount <> 0", name=op.f("ledger_entries_amount_check")),
        sa.ForeignKeyConstraint(
            ["tenant_id", "subscription_id"],
            ["subscriptions.tenant_id", "subscriptions.id"],
            name=op.f("ledger_entries_tenant_id_subscription_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "doctor_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("ledger_entries_tenant_id_doctor_id_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "transaction_id"],
            ["ledger_transactions.tenant_id", "ledger_transactions.id"],
            name=op.f("ledger_entries_tenant_id_transaction_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("ledger_entries_pkey")),
    )
    op.create_index(
        op.f("ledger_entries_doctor_id_commodity_idx"),
        "ledger_entries",
        ["doctor_id", "commodity"],
        unique=False,
        postgresql_where=sa.text("doctor_id IS NOT NULL"),
    )
    op.create_index(
        op.f("ledger_entries_subscription_id_idx"),
        "ledger_entries",
        ["subscription_id"],
        unique=False,
        postgresql_where=sa.text("subscription_id IS NOT NULL"),
    )
    op.create_index(op.f("ledger_entries_transaction_id_idx"), "ledger_entries", ["transaction_id"], unique=False)
    op.create_table(
        "cron_runs",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("slot", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", "slot", name=op.f("cron_runs_pkey")),
    )
    op.drop_constraint("conversion_runs_task_check", "conversion_runs")
    op.create_check_constraint(
        op.f("conversion_runs_task_check"), "conversion_runs", "task IN ('auto_start', 'recovery', 'legacy')"
    )
    op.add_column("sessions", sa.Column("reason", sa.Text(), nullable=True))
    op.add_column("appointments", sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("appointments", sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("sessions", sa.Column("rung_by", sa.BigInteger(), nullable=True))
    op.add_column("sessions", sa.Column("rung_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("sessions", sa.Column("allowance_units", sa.Integer(), nullable=True))
    op.add_column("sessions", sa.Column("idle_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("sessions", sa.Column("tick_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("sessions", sa.Column("warned_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index(
        "sessions_tick_idx", "sessions", ["tick_at"], unique=False, postgresql_where=sa.text("status = 'active'")
    )
    op.add_column("subscriptions", sa.Column("text_sessions_granted", sa.Integer(), nullable=True))
    op.add_column("subscriptions", sa.Column("voice_calls_granted", sa.Integer(), nullable=True))
    op.add_column("subscriptions", sa.Column("video_calls_granted", sa.Integer(), nullable=True))
    # ### end Alembic commands ###
    op.execute(
        "UPDATE subscriptions SET text_sessions_granted = text_sessions_remaining,"
        " voice_calls_granted = voice_calls_remaining, video_calls_granted = video_calls_remaining"
    )
    for column in ("text_sessions_granted", "voice_calls_granted", "video_calls_granted"):
        op.alter_column("subscriptions", column, nullable=False)
    op.execute(RUNNING)
    op.execute(SPENT)
    op.create_check_constraint(
        op.f("sessions_connected_check"),
        "sessions",
        "connected_at IS NULL OR kind = 'call' AND activated_at IS NOT NULL",
    )
    op.create_check_constraint(
        op.f("sessions_allowance_check"),
        "sessions",
        f"{_BEGUN_AT} IS NULL OR allowance_units >= 0 AND allowance_units IS NOT NULL",
    )
    op.create_check_constraint(op.f("sessions_tick_check"), "sessions", "status <> 'active' OR tick_at IS NOT NULL")
    op.create_check_constraint(
        op.f("sessions_charged_check"), "sessions", f"units_charged = 0 OR {_BEGUN_AT} IS NOT NULL"
    )
    op.execute(RATES)
    for statement in (GRANTED, GRANTED_TRIGGER, BEGUN, BEGUN_TRIGGER, APPLY, APPLY_TRIGGER, BALANCED, BALANCED_TRIGGER):
        op.execute(statement)
    op.execute(APPEND_ONLY)
    for table in ("ledger_transactions", "ledger_entries"):
        op.execute(APPEND_ONLY_TRIGGER.format(table=table))
    for grant in GRANTS:
        op.execute(grant)


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
