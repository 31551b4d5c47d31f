#!/usr/bin/env bash
# A week on the synthetic log: train day by day, each day scored before it is trained, and each night a delta that a scorer takes.
# The delta is compared with the whole artifact of that night, byte for byte.
#   examples/daily.sh [FOLDER] [ROWS] [DAYS]
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(realpath -m "${1:-runs/daily}") rows=${2:-60000} bin=$(dirname "${PYTHON:-$here/.venv/bin/python}")
[ ! -e "$work" ] || { echo "$work: exists already; name another folder" >&2; exit 2; }
mkdir -p "$work"
"$bin"/mbcnet data synth --out "$work/log" --rows "$rows"
settings=(--config "$here/mbcnet_rec/configs/demo.toml" --set schema="$work/log/schema.toml" --set train.out="$work/run"
  --set data.valid=[] --set data.test=[] --set data.order=chronological
  --set data.batch_size=128 --set train.log_every=5)
days=$(cd "$work/log" && ls -d ds=* | head -n "${3:-7}")
before=
for day in $days; do
  if [ -z "$before" ]; then
    "$bin"/mbcnet train "${settings[@]}" --set data.train="[\"$work/log/$day\"]" --progressive
  else
    "$bin"/mbcnet train --continue "$work/run" --data "$day" --progressive
    "$bin"/mbcnet export "$work/run" --since "$work/artifact/$before" --out "$work/delta/$day"
  fi
  "$bin"/mbcnet export "$work/run" --out "$work/artifact/$day" --no-aot
  [ -n "$before" ] || first=$day
  before=$day
done
# the scorer: the first day's artifact, then every delta in its order
"$bin"/python - "$work" "$first" <<'PYTHON'
import pathlib, sys
work, first = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(work / "artifact" / first))
import mbcnet_serving

model = mbcnet_serving.load(work / "artifact" / first)
for delta in sorted((work / "delta").iterdir()):
    model.apply(delta)
    whole = mbcnet_serving.load(work / "artifact" / delta.name)
    same = model.digest == whole.digest and all(
        bool((tables.weights_host == whole.tables[pooling].weights_host).all()) for pooling, tables in model.tables.items()
    )
    size, all_of_it = (sum(path.stat().st_size for path in (work / kind / delta.name).rglob("*") if path.is_file()) for kind in ("delta", "artifact"))
    print(f"{delta.name}: the scorer has its model, {'equal to' if same else 'OTHER THAN'} the whole artifact; {size / all_of_it:.0%} of its bytes")
    if not same:
        sys.exit(1)
PYTHON
echo "open $work/run/report.html: the days, and how each was scored before it was trained"
