-- Run once by the image of PostgreSQL, when it makes the database: gives the role of the services a password. The
-- migrations give it its rights.
\getenv password APP_PASSWORD
CREATE ROLE sessiongate_app LOGIN PASSWORD :'password';
