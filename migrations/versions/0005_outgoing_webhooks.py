"""Outgoing webhooks, and an audit log that nobody can rewrite.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Grants keep the services from it; this keeps everybody, whose mistake it would be otherwise.
APPEND_ONLY_TRIGGER = """
CREATE TRIGGER audit_log_only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
FOR EACH STATEMENT EXECUTE FUNCTION only_added_to()
"""

GRANTS = (
    "GRANT SELECT ON webhook_endpoints, webhook_secrets TO sessiongate_app",
    "GRANT INSERT, UPDATE, DELETE ON webhook_endpoints, webhook_secrets TO sessiongate_app",
    # What an endpoint that is removed has not got, nobody waits for.
    "GRANT DELETE ON outbox_deliveries TO sessiongate_app",
)

PENDING = "lane = 'webhooks' AND dispatched_at IS NULL AND dead_at IS NULL"


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=True),
        sa.Column("events", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("disabled_reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.CheckConstraint(
            "disabled_reason IN ('operator', 'gone')", name=op.f("webhook_endpoints_disabled_reason_check")
        ),
        sa.CheckConstraint(
            "(disabled_at IS NULL) = (disabled_reason IS NULL)", name=op.f("webhook_endpoints_disabled_check")
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("webhook_endpoints_tenant_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_endpoints_pkey")),
        sa.UniqueConstraint("tenant_id", "id", name=op.f("webhook_endpoints_tenant_id_id_key")),
        sa.UniqueConstraint("tenant_id", "url", name=op.f("webhook_endpoints_tenant_id_url_key")),
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("tenant_id", sa.BigInteger(), nullable=False),
        sa.Column("endpoint_id", sa.BigInteger(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "endpoint_id"],
            ["webhook_endpoints.tenant_id", "webhook_endpoints.id"],
            name=op.f("webhook_secrets_tenant_id_endpoint_id_fkey"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("webhook_secrets_pkey")),
    )
    op.create_index(op.f("webhook_secrets_endpoint_id_idx"), "webhook_secrets", ["endpoint_id"], unique=False)
    op.create_index(
        "webhook_secrets_current_key",
        "webhook_secrets",
        ["endpoint_id"],
        unique=True,
        postgresql_where=sa.text("expires_at IS NULL"),
    )
    op.add_column("outbox_deliveries", sa.Column("response_status", sa.Integer(), nullable=True))
    op.drop_constraint(op.f("outbox_deliveries_lane_check"), "outbox_deliveries")
    op.create_check_constraint(
        op.f("outbox_deliveries_lane_check"), "outbox_deliveries", "lane IN ('urgent', 'normal', 'webhooks')"
    )
    op.create_index(
        "outbox_deliveries_webhook_pending_idx",
        "outbox_deliveries",
        ["consumer", "available_at", "id"],
        unique=False,
        postgresql_where=sa.text(PENDING),
    )
    op.create_index(
        "outbox_deliveries_webhook_idx",
        "outbox_deliveries",
        ["consumer", "id"],
        unique=False,
        postgresql_where=sa.text("lane = 'webhooks'"),
    )
    op.execute(APPEND_ONLY_TRIGGER)
    for grant in GRANTS:
        op.execute(grant)


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
