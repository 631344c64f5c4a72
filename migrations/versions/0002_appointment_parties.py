"""Whose appointments these are, in a table of its own.

The indexes by person were written again by every conversion, on a page of their own for each person: the more
appointments, the slower each.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PARTIES = """
INSERT INTO appointment_parties (user_id, appointment_id)
SELECT party.user_id, a.id FROM {appointments} a
CROSS JOIN LATERAL (SELECT a.patient_id UNION SELECT a.doctor_id) AS party(user_id)
"""

JOIN_PARTIES = f"""
CREATE FUNCTION appointments_join_parties() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {PARTIES.format(appointments="booked").strip()};
    RETURN NULL;
END $$
"""

TRIGGER = """
CREATE TRIGGER appointments_join_parties AFTER INSERT ON appointments
REFERENCING NEW TABLE AS booked FOR EACH STATEMENT EXECUTE FUNCTION appointments_join_parties()
"""


def upgrade() -> None:
    op.create_table(
        "appointment_parties",
        sa.Column("user_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("appointment_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.ForeignKeyConstraint(
            ["appointment_id"], ["appointments.id"], name=op.f("appointment_parties_appointment_id_fkey")
        ),
        sa.PrimaryKeyConstraint("user_id", "appointment_id", name=op.f("appointment_parties_pkey")),
    )
    op.execute(PARTIES.format(appointments="appointments"))
    op.execute(JOIN_PARTIES)
    op.execute(TRIGGER)
    op.execute("GRANT SELECT, INSERT ON appointment_parties TO sessiongate_app")
    op.drop_index("appointments_patient_id_id_idx", table_name="appointments")
    op.drop_index("appointments_doctor_id_id_idx", table_name="appointments")


def downgrade() -> None:
    raise NotImplementedError("Migrations go forward only; restore a backup instead.")
