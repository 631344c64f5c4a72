"""Alerts of the platform.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "alerts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("component", sa.Text(), nullable=True),
        sa.Column("metric", sa.Text(), nullable=True),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("threshold", sa.Float(), nullable=True),
        sa.Column("labels", postgresql.JSONB(), nullable=False),
        sa.Column("annotations", postgresql.JSONB(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("resolved_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("deliveries", sa.Integer(), nullable=False),
        sa.Column("resolutions", sa.Integer(), nullable=False),
        sa.CheckConstraint("severity IN ('info', 'warning', 'high', 'critical')", name=op.f("alerts_severity_check")),
        sa.CheckConstraint("resolved_at >= started_at", name=op.f("alerts_period_check")),
        sa.CheckConstraint(
            "(resolutions > 0) = (resolved_at IS NOT NULL) AND resolutions <= deliveries",
            name=op.f("alerts_resolutions_check"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("alerts_pkey")),
        sa.UniqueConstraint(
            "source", "fingerprint", "started_at", name=op.f("alerts_source_fingerprint_started_at_key")
        ),
    )
    op.create_index(
        "alerts_firing_idx", "alerts", ["id"], unique=False, postgresql_where=sa.text("resolved_at IS NULL")
    )
    op.create_index(op.f("alerts_resolved_at_idx"), "alerts", ["resolved_at"], unique=False)
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON alerts TO sessiongate_app")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
