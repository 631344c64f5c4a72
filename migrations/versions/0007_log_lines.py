"""Lines of the log, for those who have no other place to search them.

Revision ID: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "log_lines",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.Text(), nullable=False),
        sa.Column("urgent", sa.Boolean(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("category", sa.Text(), nullable=True),
        sa.Column("component", sa.Text(), nullable=True),
        sa.Column("service", sa.Text(), nullable=False),
        sa.Column("correlation_id", sa.Text(), nullable=True),
        sa.Column("user_id", sa.BigInteger(), nullable=True),
        sa.Column("session_id", sa.BigInteger(), nullable=True),
        sa.Column("tenant_id", sa.BigInteger(), nullable=True),
        sa.Column("line", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("log_lines_pkey")),
    )
    op.create_index(op.f("log_lines_at_idx"), "log_lines", ["at"], unique=False)
    op.create_index(op.f("log_lines_urgent_id_idx"), "log_lines", ["urgent", "id"], unique=False)
    op.create_index(op.f("log_lines_correlation_id_idx"), "log_lines", ["correlation_id"], unique=False)
    op.execute("GRANT SELECT, INSERT, DELETE ON log_lines TO sessiongate_app")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
