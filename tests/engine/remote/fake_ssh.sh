#!/bin/sh
# What ssh does for finetui, on this machine: drops the options and the address, and gives the command to a shell.
while [ $# -gt 0 ]; do
  [ -z "$FAKE_SSH_DOWN" ] || { echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255; }
case "$1" in
    -o) shift 2 ;;
    -O) exit 0 ;;
    -T) shift ;;
    -*) echo "unknown option $1" >&2; exit 255 ;;
    *) break ;;
  esac
done
[ -z "$FAKE_SSH_DOWN" ] || { echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255; }
case "$1" in
  *nowhere*) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255 ;;
esac
shift
echo "Welcome to the box" # as some shells greet
[ -z "$FAKE_SSH_HOME" ] || { HOME=$FAKE_SSH_HOME; export HOME; unset XDG_STATE_HOME FINETUI_RUNS; }
exec sh -c "$*"
