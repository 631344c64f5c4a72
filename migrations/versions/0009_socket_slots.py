"""Which sockets are open, over all API processes.

Revision ID: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_processes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("api_processes_pkey")),
    )
    op.create_table(
        "socket_slots",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("slot", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("process_id", sa.Uuid(), nullable=False),
        sa.Column("socket_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(
            ["process_id"], ["api_processes.id"], name=op.f("socket_slots_process_id_fkey"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id", "user_id"],
            ["users.tenant_id", "users.id"],
            name=op.f("socket_slots_tenant_id_user_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("user_id", "slot", name=op.f("socket_slots_pkey")),
        sa.UniqueConstraint("process_id", "socket_id", name=op.f("socket_slots_process_id_socket_id_key")),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON api_processes TO sessiongate_app")
    op.execute("GRANT SELECT, INSERT, DELETE ON socket_slots TO sessiongate_app")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
