#!/bin/bash
# play.sh with the programs of this build.
set -euo pipefail
readonly programs=$TEST_TMPDIR/bin
mkdir "$programs"
for program in router worker state_store rwkvctl; do
  cp -L "services/$program/$program" "$programs/$program"
done
status=0
deploy/images/play.sh --programs "$programs" || status=$?
if ((status == 77)); then exit 0; fi  # It has said why.
exit "$status"
