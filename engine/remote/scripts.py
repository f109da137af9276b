"""What runs on the other machine: plain POSIX shell with the tools that every Linux has; nothing is installed there.

Answers are frames on standard output: a line of a letter and its fields, and after some a number of raw bytes.

    R <path>                    a run directory begins; the path is the rest of the line
    F <bytes> <name>            a small file of it, whole
    C <bytes> <offset>          whole lines for its event file, some left out, which was read up to this byte with them
    E <bytes> <offset>          the same with nothing left out, cut anywhere
    L <bytes> <name>            more of one of its logs
    A <1|0|?>                   whether its supervisor's process lives; ? if it is on yet another machine
    S <seconds>                 that was all for now; the machine's clock
    X <words>                   it can't be read
"""

from __future__ import annotations

#: Functions that both scripts use. ``file`` and ``alive`` work in the run's directory.
_COMMON = r"""
export LC_ALL=C
field() { sed -n 's/.*"'"$1"'": *"\{0,1\}\([^",}]*\).*/\1/p' run.json 2>/dev/null | head -n 1; }
text() { printf '%s %s %s\n' "$1" "$(printf %s "$3" | wc -c | tr -d ' ')" "$2"; printf '%s\n' "$3"; }
file() { [ -f "$1" ] && text F "$1" "$(cat "$1")"; }
alive() {
  host=$(field host); pid=$(field pid)
  if [ -n "$host" ] && [ "$host" != "$(hostname)" ]; then echo 'A ?'
  elif [ -n "$pid" ] && [ "$pid" != 0 ] && { [ -d "/proc/$pid" ] || ps -p "$pid" >/dev/null 2>&1; }; then echo 'A 1'
  else echo 'A 0'; fi
}
seldom='"type":"(state|eval|checkpoint|fallback|warning|failure)"'
"""

#: Lists runs: those in the user's index, under ``$FINETUI_RUNS`` and in ``~/runs``. With each, its newest events and
#: those that are told seldom: from all of its past if ``$WHOLE`` is 1, else from its end, so that a list that is asked
#: for again and again costs the machine milliseconds.
LIST = (
    _COMMON
    + r"""
{
  cat "${XDG_STATE_HOME:-$HOME/.local/state}/finetui/runs" 2>/dev/null
  for root in "${FINETUI_RUNS:-$HOME/runs}" "$HOME/runs"; do ls -d "$root"/*/ 2>/dev/null; done
} | sed 's:/*$::' | sort -u | while IFS= read -r run; do
  [ -f "$run/run.json" ] && cd "$run" 2>/dev/null || continue
  printf 'R %s\n' "$run"
  file recipe.yaml; file plan.json; file run.json; alive
  if [ -f events.jsonl ]; then
    size=$(wc -c < events.jsonl | tr -d ' ')
    from=$((size > 32768 ? size - 32768 : 0))
    begin=$((WHOLE == 1 || from < 4194304 ? 0 : from - 4194304))
    text C "$size" "$(tail -c "+$((begin + 1))" events.jsonl | head -c "$((from - begin))" |
      grep -a -E "$seldom" | tail -n 300
      tail -c "+$((from + 1))" events.jsonl)"
  fi
done
echo "S $(date +%s)"
"""
)

#: Follows the run in ``$RUN`` from byte ``$OFFSET`` of its events on, for ever. Of a past longer than ``$LONG`` bytes
#: it sends what is told seldom and a step with its figures at each of some 1500 places, then all of the last part.
FOLLOW = (
    _COMMON
    + r"""
cd "$RUN" 2>/dev/null || { echo "X there is no folder $RUN"; exit 3; }
[ -f run.json ] || { echo "X there is no run in $RUN"; exit 3; }
size() { wc -c < "$1" 2>/dev/null | tr -d ' '; }
file recipe.yaml; file plan.json
last=; round=0; off=$OFFSET
all=$(size events.jsonl)
if [ "$off" = 0 ] && [ "${all:-0}" -gt "$LONG" ]; then
  end=$((all - LONG / 4))
  end=$((end + $(tail -c "+$((end + 1))" events.jsonl | head -n 1 | wc -c)))
  text C "$end" "$(head -c "$end" events.jsonl | awk -v every=$((end / 1500)) '
    { at += length($0) + 1 }
    /"type":"(state|eval|checkpoint|fallback|warning|failure)"/ { print; next }
    /"type":"step"/ { on = at >= due || NR < 500; if (on) { print; due = at + every }; next }
    on && /"type":"metrics"/ { print }')"
  off=$end
fi
while :; do
  now=$(cat run.json 2>/dev/null) || { echo "X there is no run in $RUN any more"; exit 3; }
  [ "$now" = "$last" ] || { text F run.json "$now"; last=$now; }
  all=$(size events.jsonl); all=${all:-0}
  [ "$all" -ge "$off" ] || off=$all
  behind=$((all - off))
  [ "$behind" -le 1048576 ] || behind=1048576
  if [ "$behind" -gt 0 ]; then
    printf 'E %d %d\n' "$behind" "$((off + behind))"
    tail -c "+$((off + 1))" events.jsonl | head -c "$behind"; echo
    off=$((off + behind))
  fi
  if [ $((round % 3)) = 0 ]; then
    for log in log/*.log; do
      [ -f "$log" ] || continue
      key=$(printf %s "$log" | tr -c 'A-Za-z0-9' _); eval "at=\${log_$key:-}"
      full=$(size "$log")
      [ -n "$at" ] || at=$((full > 262144 ? full - 262144 : 0))
      [ "$full" -ge "$at" ] || at=0
      more=$((full - at)); [ "$more" -le 1048576 ] || more=1048576
      if [ "$more" -gt 0 ]; then
        printf 'L %d %s\n' "$more" "$log"; tail -c "+$((at + 1))" "$log" | head -c "$more"; echo
        at=$((at + more))
      fi
      eval "log_$key=$at"
    done
  fi
  alive; [ "$off" -lt "$all" ] || echo "S $(date +%s)"
  round=$((round + 1))
  [ "$off" -lt "$all" ] || sleep 1
done
"""
)

#: Asks the run in ``$RUN`` for ``$WHAT``: stop or checkpoint.
REQUEST = r"""cd "$RUN" && mkdir -p control && : > "control/$WHAT" && echo done"""

#: Ends the run in ``$RUN`` at once: its supervisor ends its ranks when it is told to quit.
KILL = (
    _COMMON
    + r"""
cd "$RUN" || exit 3
pid=$(field pid)
[ "$(alive)" = 'A 1' ] || { echo 'it is not at work there' >&2; exit 4; }
ps -o args= -p "$pid" | grep -q supervisor || { echo "process $pid is not its supervisor" >&2; exit 4; }
kill -QUIT "$pid" || exit 5
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
  [ "$(alive)" = 'A 1' ] || { echo done; exit 0; }
  sleep 1
done
echo "process $pid did not end within 15 seconds" >&2; exit 6
"""
)

#: Continues the run in ``$RUN``, with the finetui of that machine.
RESUME = r"""
command -v finetui >/dev/null || PATH="$HOME/.local/bin:$PATH"
command -v finetui >/dev/null || { echo 'there is no finetui on the PATH of that machine' >&2; exit 4; }
finetui resume "$RUN" --json < /dev/null > /dev/null && echo done
"""
