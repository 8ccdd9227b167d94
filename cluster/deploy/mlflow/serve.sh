#!/usr/bin/env bash
# An MLflow server with accounts, artifacts and a Postgres below it. All settings come from the environment, so that no
# password stands on a command line, where everyone on the machine can read it:
#
#   MLFLOW_BACKEND_STORE_URI         postgresql+psycopg2://USER:PASSWORD@HOST:5432/DATABASE (the driver must be named)
#   MLFLOW_AUTH_ADMIN_PASSWORD       of the account `admin`, at the first start; later it is changed in MLflow
#   MLFLOW_FLASK_SERVER_SECRET_KEY   any long random text, always the same
#   ESCALA_MLFLOW_NAME               the name that people and clusters call the server by: mlflow.example.org
#   MLFLOW_ARTIFACTS_DESTINATION     a folder of this machine, or s3://BUCKET/PATH, gs://BUCKET/PATH
#   ESCALA_MLFLOW_LISTEN             address:port, by default 127.0.0.1:5000: the proxy before it does TLS
set -euo pipefail
umask 077

for name in MLFLOW_BACKEND_STORE_URI MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY ESCALA_MLFLOW_NAME \
  MLFLOW_ARTIFACTS_DESTINATION; do
  if [[ -z ${!name:-} ]]; then
    echo "error: $name is not set; the head of $0 says what it is." >&2
    exit 2
  fi
done
case $MLFLOW_BACKEND_STORE_URI in
  postgresql://*)
    echo "error: MLFLOW_BACKEND_STORE_URI must name its driver: postgresql+psycopg2://..." >&2
    exit 2
    ;;
esac
listen=${ESCALA_MLFLOW_LISTEN:-127.0.0.1:5000}

# The accounts live in the same database. The file holds its password, so it is this user's alone and not kept; a %
# there would be read as the beginning of a variable. Without the cache each request pays for a slow password hash.
folder=$(mktemp -d)
export MLFLOW_AUTH_CONFIG_PATH=$folder/basic_auth.ini
cat >"$MLFLOW_AUTH_CONFIG_PATH" <<EOF
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = admin
auth_cache_ttl_seconds = 60
EOF
trap 'rm -rf "$folder"' EXIT
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # eight processes, for judging of texts

mlflow server --app-name basic-auth --host "${listen%:*}" --port "${listen##*:}" --workers "${ESCALA_MLFLOW_WORKERS:-4}" \
  --serve-artifacts --artifacts-destination "$MLFLOW_ARTIFACTS_DESTINATION" \
  --allowed-hosts "$ESCALA_MLFLOW_NAME,$ESCALA_MLFLOW_NAME:*,localhost:*,127.0.0.1:*" \
  --cors-allowed-origins "https://$ESCALA_MLFLOW_NAME" &
server=$!
trap 'kill -TERM "$server"; wait "$server" || true; rm -rf "$folder"; exit 143' TERM INT
wait "$server"
