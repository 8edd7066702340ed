#!/usr/bin/env python3
"""Writes the Grafana boards (boards/*.json) and the PrometheusRules for Kubernetes. A test compares; run after edits.

A panel is a title, what it shows, the unit and its expressions with their legends.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def quantile(q, metric, by="le"):
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket[5m])))"


def latencies(metric):
    return [(quantile(q, metric), f"p{int(q * 100)}") for q in (0.5, 0.95, 0.99)]


BOARDS = {
    "overview": ("RWKV serving: overview", [
        ("Processes", "Those that answer their scrapes, and those that take work.", "none", [
            ('sum(up{job=~".*rwkv-serving"})', "up"), ("sum(rwkv_server_ready)", "ready"),
            ("sum(rwkv_server_draining)", "draining")]),
        ("Tokens", "Read, generated, and not read again since a state was there, a second.", "short", [
            ("sum by (kind) (rate(rwkv_router_tokens_total[1m]))", "{{kind}}")]),
        ("Calls", "Running and waiting.", "none", [
            ("sum(rwkv_router_running_turns)", "running"), ("sum(rwkv_router_waiting_turns)", "waiting")]),
        ("First token", "Arrival of a call to its first token leaving.", "s", latencies("rwkv_router_ttft_seconds")),
        ("Between tokens", "Time between two tokens of an answer.", "s", latencies("rwkv_router_inter_token_seconds")),
        ("Waiting", "Arrival of a call to its first rows leaving.", "s", latencies("rwkv_router_queue_seconds")),
        ("Whole calls", "Arrival of a call to the end of its answer.", "s", latencies("rwkv_router_call_seconds")),
        ("Answers by end", "How answers ended, a second.", "short", [
            ("sum by (reason) (rate(rwkv_router_turns_finished_total[5m]))", "{{reason}}")]),
        ("Errors", "Calls that ended with an error, a second.", "short", [
            ("sum by (cause) (rate(rwkv_router_errors_total[5m]))", "{{cause}}")]),
        ("Calls by code", "Answered by all processes, a second.", "short", [
            ("sum by (grpc_code) (rate(grpc_server_handled_total[5m]))", "{{grpc_code}}")]),
        ("What runs", "Processes by version.", "none", [
            ("count by (version) (rwkv_build_info)", "{{version}}")]),
        ("Refused at the door", "Calls without a known identity, or without the right.", "short", [
            ("sum by (cause) (rate(rwkv_server_refused_calls_total[5m]))", "{{cause}}")]),
        ("Memory", "Resident memory of each process.", "bytes", [
            ("process_resident_memory_bytes", "{{process}}")]),
        ("Processor", "Processors in use by each process.", "none", [
            ("rate(process_cpu_seconds_total[1m])", "{{process}}")]),
        ("Certificates", "Days until those in use expire; of unusable files nothing.", "d", [
            ("((rwkv_tls_expiry_timestamp_seconds > 0) - time()) / 86400", "{{process}} {{file}}")]),
        ("Files of no use", "TLS files, API keys, tenants: 1 while what was there before is used.", "none", [
            ("rwkv_tls_expiry_timestamp_seconds == bool 0", "{{process}} TLS {{file}}"),
            ("rwkv_server_file_unusable", "{{process}} {{file}}")]),
    ]),
    "pipelines": ("RWKV serving: pipelines", [
        ("Slots", "Slots of all pipelines by state.", "none", [("sum by (state) (rwkv_router_slots)", "{{state}}")]),
        ("Slots in use", "Share of the slots that calls hold.", "percentunit", [("rwkv:slots_used:ratio", "used")]),
        ("Step", "Time of a step by stage and phase (p95).", "s", [
            (quantile(0.95, "rwkv_worker_step_seconds", "le, process, phase"), "{{process}} {{phase}}")]),
        ("Rows of a step", "As routers send them (mean).", "none", [
            ("rate(rwkv_router_batch_rows_sum[5m]) / rate(rwkv_router_batch_rows_count[5m])", "{{process}}")]),
        ("Steps in flight", "Microbatches in the pipelines.", "none", [
            ("sum by (process) (rwkv_router_microbatches_in_flight)", "{{process}}")]),
        ("Waits for the link", "A stage waits for rows of the one before, or for room at the one behind.", "s", [
            ("rate(rwkv_worker_link_receive_wait_seconds_sum[5m])", "{{process}} receive"),
            ("rate(rwkv_worker_link_send_wait_seconds_sum[5m])", "{{process}} send")]),
        ("Sent to the next stage", "Rows, bytes a second.", "Bps", [
            ("rate(rwkv_worker_link_sent_bytes_total[5m])", "{{process}}")]),
        ("Since the last step", "While steps are in flight it should not grow.", "s", [
            ("time() - rwkv_router_last_step_timestamp_seconds", "{{process}}")]),
        ("Recovery", "Seconds that turns waited for a slot again after their pipeline was lost, of all turns, "
         "and tokens that were fed again, a second.", "none", [
            ("sum(rate(rwkv_router_recovery_seconds_sum[10m]))", "seconds lost a second"),
            ("sum(rate(rwkv_router_replayed_tokens_total[10m]))", "tokens fed again")]),
        ("Epochs", "Pipelines opened and lost.", "none", [
            ("sum(increase(rwkv_router_epochs_total[10m]))", "opened"),
            ("sum(increase(rwkv_router_epochs_lost_total[10m]))", "lost")]),
        ("Turns that moved", "Went on after their pipeline was lost, or gave their slot away.", "none", [
            ("sum(increase(rwkv_router_recovered_turns_total[10m]))", "recovered"),
            ("sum(increase(rwkv_router_yielded_turns_total[10m]))", "yielded")]),
        ("Prefill and decode", "First rows to first token, first token to last (p95).", "s", [
            (quantile(0.95, "rwkv_router_prefill_seconds"), "prefill"),
            (quantile(0.95, "rwkv_router_decode_seconds"), "decode")]),
        ("Workers wanted", "What autoscaling asks for, and what is there.", "none", [
            ("rwkv:workers_wanted", "wanted"), ("rwkv:workers", "there")]),
    ]),
    "states-and-store": ("RWKV serving: states and store", [
        # Stores over one PostgreSQL and S3 count all of it, each of them: the largest of them, not their sum.
        ("Sessions", "Sessions and their snapshots.", "none", [
            ("max(rwkv_state_store_sessions)", "sessions"), ("max(rwkv_state_store_snapshots)", "snapshots")]),
        ("Stored", "Bytes of all states, and what --max_stored_bytes bounds: logs, and states but for the prefix "
         "cache's.", "bytes", [
            ("max(rwkv_state_store_records_bytes)", "states"),
            ("max(rwkv_state_store_stored_bytes)", "stored")]),
        ("Disk", "Free on the file system of the store.", "bytes", [
            ("rwkv_state_store_disk_free_bytes", "{{process}} free"), ("rwkv_state_store_disk_bytes", "{{process}}")]),
        ("Since the last commit", "Of tokens, as the routers see it; idle routers commit none.", "s", [
            ("time() - rwkv_router_last_commit_timestamp_seconds", "{{process}}")]),
        ("Writable", "0: the store has stopped to accept writes.", "none", [
            ("min by (process) (rwkv_state_store_writable)", "{{process}}")]),
        ("Commits of tokens", "As the routers see them, retries included.", "s",
         latencies("rwkv_router_store_commit_seconds")),
        ("Calls of the store", "Time of its calls (p95).", "s", [
            (quantile(0.95, "rwkv_state_store_rpc_seconds", "le, method"), "{{method}}")]),
        ("States written and read", "Bytes a second.", "Bps", [
            ("sum(rate(rwkv_state_store_records_written_bytes_total[5m]))", "written"),
            ("sum(rate(rwkv_state_store_records_read_bytes_total[5m]))", "read")]),
        ("Snapshots", "Committed, failed and dropped by routers.", "none", [
            ("sum by (result) (increase(rwkv_router_snapshots_total[10m]))", "{{result}}")]),
        ("Saving and loading a state", "By a stage (p95).", "s", [
            (quantile(0.95, "rwkv_worker_snapshot_save_seconds", "le, process"), "{{process}} save"),
            (quantile(0.95, "rwkv_worker_snapshot_load_seconds", "le, process"), "{{process}} load")]),
        ("States under way", "Bytes of copies that have not reached the store.", "bytes", [
            ("rwkv_worker_snapshot_bytes_in_flight", "{{process}}")]),
        ("Prefix cache", "Inputs looked up, by result; states kept and let go.", "none", [
            ("sum by (result) (increase(rwkv_router_prefix_lookups_total[10m]))", "{{result}}"),
            ("sum(increase(rwkv_router_prefixes_kept_total[10m]))", "kept"),
            ("sum(increase(rwkv_state_store_prefixes_evicted_total[10m]))", "let go")]),
        ("Prefix cache: bytes", "In the store, and in the memory of workers.", "bytes", [
            ("max(rwkv_state_store_prefix_bytes)", "store"),
            ("sum(rwkv_worker_kept_state_bytes)", "workers")]),
        ("Damage", "Records that are not what was written, and refusals for want of room.", "none", [
            ("sum(increase(rwkv_state_store_corrupt_records_total[1h]))", "corrupt"),
            ("sum(increase(rwkv_state_store_full_refusals_total[1h]))", "full")]),
    ]),
    "tenants": ("RWKV serving: tenants", [
        ("Tokens generated", "Tokens a second sent to each tenant.", "short", [
            ('sum by (tenant) (rate(rwkv_router_tenant_tokens_total{kind="generated"}[1m]))', "{{tenant}}")]),
        ("Tokens fed", "Tokens a second of each tenant's input.", "short", [
            ('sum by (tenant) (rate(rwkv_router_tenant_tokens_total{kind="prompt"}[1m]))', "{{tenant}}")]),
        ("Calls", "Let in, a second.", "short", [
            ("sum by (tenant) (rate(rwkv_router_tenant_requests_total[5m]))", "{{tenant}}")]),
        ("Running", "Calls that run or wait.", "none", [
            ("sum by (tenant) (rwkv_router_tenant_running_calls)", "{{tenant}}")]),
        ("Refused", "For a limit of the tenants file, a second.", "short", [
            ("sum by (tenant, limit) (rate(rwkv_router_tenant_refused_total[5m]))", "{{tenant}} {{limit}}")]),
    ]),
}


def board(name):
    title, panels = BOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": f"rwkv-{name}", "title": title, "tags": ["rwkv-serving"], "schemaVersion": 38, "editable": True,
        "refresh": "15s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": [{
            "id": index + 1, "type": "timeseries", "title": panel[0], "description": panel[1], "datasource": source,
            "gridPos": {"h": 8, "w": 8, "x": 8 * (index % 3), "y": 8 * (index // 3)},
            "fieldConfig": {"defaults": {"unit": panel[2]}, "overrides": []},
            "targets": [{"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
                        for i, (expr, legend) in enumerate(panel[3])],
        } for index, panel in enumerate(panels)],
    }


def prometheus_rules():
    """The rule files as custom resources, word for word."""
    text = "# Written by deploy/monitoring/make_boards.py from deploy/monitoring/rules.\n"
    for index, name in enumerate(["recording", "alerts"]):
        with open(f"{HERE}/rules/{name}.yaml", encoding="utf-8") as file:
            rules = [line for line in file.read().splitlines() if not line.startswith("#")]
        text += ("---\n" if index else "") + "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
        text += f"metadata:\n  name: rwkv-{name}\nspec:\n" + "".join(f"  {line}\n" if line else "\n" for line in rules)
    return text


def outputs():
    files = {f"{HERE}/boards/{name}.json": json.dumps(board(name), indent=1) + "\n" for name in BOARDS}
    files[f"{HERE}/../kubernetes/components/monitoring/prometheus-rules.yaml"] = prometheus_rules()
    return files


if __name__ == "__main__":
    for path, content in outputs().items():
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    sys.exit(0)
