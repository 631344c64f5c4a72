"""What the last audit found, for every worker to tell alike.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audits",
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("violations", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.PrimaryKeyConstraint("checked_at", name=op.f("audits_pkey")),
    )
    op.execute("GRANT SELECT, INSERT, DELETE ON audits TO sessiongate_app")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
