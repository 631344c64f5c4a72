"""All of the gate: replies, reactions, read marks, sealed bodies, tickets of sockets, flags, decisions.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

GRANTS = (
    "GRANT SELECT ON reactions, socket_tickets, flag_overrides, decisions, decision_totals TO sessiongate_app",
    "GRANT INSERT, UPDATE ON reactions TO sessiongate_app",
    "GRANT INSERT, DELETE ON socket_tickets, decisions TO sessiongate_app",
    "GRANT INSERT, UPDATE, DELETE ON flag_overrides, decision_totals TO sessiongate_app",
)


def upgrade() -> None:
    op.create_table(
        "decision_totals",
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("flag", sa.Text(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("decision_totals_tenant_id_fkey")),
        sa.PrimaryKeyConstraint(
            "minute", "tenant_id", "operation", "verdict", "flag", name=op.f("decision_totals_pkey")
        ),
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("operation", sa.Text(), nullable=False),
        sa.Column("identifier", sa.Text(), nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("client", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("flag", sa.Text(), nullable=True),
        sa.Column("flags", postgresql.JSONB(), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=True),
        sa.CheckConstraint("verdict IN ('allowed', 'warned', 'refused')", name=op.f("decisions_verdict_check")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("decisions_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("decisions_pkey")),
    )
    op.create_index(op.f("decisions_appointment_id_id_idx"), "decisions", ["appointment_id", "id"], unique=False)
    op.create_index(op.f("decisions_at_idx"), "decisions", ["at"], unique=False)
    op.create_index(op.f("decisions_session_id_id_idx"), "decisions", ["session_id", "id"], unique=False)
    op.create_index(op.f("decisions_tenant_id_id_idx"), "decisions", ["tenant_id", "id"], unique=False)
    op.create_table(
        "flag_overrides",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("flag", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=True),
        sa.Column("target", postgresql.JSONB(), nullable=False),
        sa.Column("tripwire", postgresql.JSONB(), nullable=True),
        sa.Column("changed_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("flag_overrides_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("flag_overrides_pkey")),
        sa.UniqueConstraint(
            "flag", "tenant_id", name=op.f("flag_overrides_flag_tenant_id_key"), postgresql_nulls_not_distinct=True
        ),
    )
    op.create_table(
        "socket_tickets",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("context", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("token_expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "user_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("socket_tickets_tenant_id_user_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("digest", name=op.f("socket_tickets_pkey")),
    )
    op.create_index(op.f("socket_tickets_expires_at_idx"), "socket_tickets", ["expires_at"], unique=False)
    op.create_table(
        "reactions",
        sa.Column("conversation_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("message_seq", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("emoji", sa.Text(), nullable=False),
        sa.Column("present", sa.Boolean(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("char_length(emoji) BETWEEN 1 AND 32", name=op.f("reactions_emoji_check")),
        sa.ForeignKeyConstraint(
            ["conversation_id", "message_seq"],
            ["messages.conversation_id", "messages.seq"],
            name=op.f("reactions_conversation_id_message_seq_fkey"),
        ),
        sa.ForeignKeyConstraint(
            ["conversation_id", "user_id"],
            ["participants.conversation_id", "participants.user_id"],
            name=op.f("reactions_conversation_id_user_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("conversation_id", "message_seq", "user_id", "emoji", name=op.f("reactions_pkey")),
        sa.UniqueConstraint("conversation_id", "revision", name=op.f("reactions_conversation_id_revision_key")),
    )
    op.create_index(
        "outbox_events_appointment_idx",
        "outbox_events",
        ["aggregate", "id"],
        unique=False,
        postgresql_where=sa.text("name NOT IN ('session_started', 'session_ended')"),
    )
    op.alter_column("audit_log", "tenant_id", existing_type=sa.BIGINT(), nullable=True)
    op.add_column("conversations", sa.Column("revision", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("messages", sa.Column("sealed_body", sa.LargeBinary(), nullable=True))
    op.add_column("messages", sa.Column("key_id", sa.Text(), nullable=True))
    op.add_column("messages", sa.Column("reply_to_seq", sa.BigInteger(), nullable=True))
    op.alter_column("messages", "body", existing_type=sa.TEXT(), nullable=True)
    op.create_foreign_key(
        op.f("messages_conversation_id_reply_to_seq_fkey"),
        "messages",
        "messages",
        ["conversation_id", "reply_to_seq"],
        ["conversation_id", "seq"],
    )
    op.add_column(
        "participants", sa.Column("last_read_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False)
    )
    op.add_column("participants", sa.Column("paced_at", sa.DateTime(timezone=True), nullable=True))
    op.create_check_constraint(
        op.f("messages_body_check"),
        "messages",
        "(body IS NULL) = (sealed_body IS NOT NULL) AND (sealed_body IS NULL) = (key_id IS NULL)",
    )
    op.create_check_constraint(op.f("messages_reply_check"), "messages", "reply_to_seq < seq")
    for grant in GRANTS:
        op.execute(grant)


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
