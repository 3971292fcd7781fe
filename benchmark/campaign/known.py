"""Inputs that once broke something, and the test that covers the whole kind of each."""

from __future__ import annotations

# what was done -> the test, as FILE::FUNCTION below test/
KNOWN: dict[str, str] = {
    "16 clients in a small pool, every penalty kind": (
        "runtime/requests/test_request_features.py::test_a_preemption_changes_nothing_that_was_asked_for"
    ),
    "a batch with penalties that is taken apart": (
        "runtime/requests/test_request_features.py::test_no_list_or_count_is_shared_between_the_parts_of_a_batch"
    ),
    "29 kinds of request in one burst, against stock one by one": (
        "runtime/requests/test_request_features.py::test_sitting_out_cutting_and_mixing_change_nothing_that_was_asked_for"
    ),
    "log-probabilities of named tokens beside requests that name none": (
        "runtime/requests/test_request_features.py::test_log_probabilities_of_every_kind_are_served_in_one_batch"
    ),
    "a request that makes planning raise while the pool is full": (
        "runtime/scheduler/test_half_way.py::test_nobody_is_lost_half_way"
    ),
    "a copy to the host that raises, once": (
        "runtime/scheduler/test_half_way.py::test_nobody_is_lost_half_way"
    ),
    "a batch that SGLang itself cannot build": (
        "runtime/scheduler/test_half_way.py::test_those_of_a_batch_that_sglang_cannot_build_are_answered"
    ),
    "limits that claim to be the server's own": "server_edge/test_limits.py::test_a_forged_mark_of_the_server_is_refused",
    "limits in odd encodings, depths and places, on every endpoint": (
        "server_edge/test_door.py::test_any_body_is_refused_by_name_or_read"
    ),
    "26 at once, two tokenizer workers, two replicas, a short queue": (
        "runtime/report/test_senders.py::test_an_abort_of_a_request_names_its_worker"
    ),
    "loads while requests are on the host": (
        "runtime/report/test_loads.py::test_requests_on_the_host_and_in_parts_of_a_batch_are_counted_once"
    ),
    "aborts, of one and of all, in the middle of a swap": (
        "runtime/kv/test_preempt.py::test_an_abort_in_mid_swap_frees_both_sides"
    ),
    "a pause by retraction": (
        "runtime/kv/test_preempt.py::test_pause_by_retraction_holds_no_kv_for_the_swapped"
    ),
    "one request that fills the whole pool": (
        "runtime/kv/test_preempt.py::test_one_that_fills_the_whole_pool_alone_is_answered"
    ),
    "clients that leave": "server/test_clients.py::test_a_client_that_leaves_gives_its_memory_back",
    "best effort after a quiet minute": (
        "core/test_quiet_times.py::test_the_expected_wait_is_the_same_after_a_quiet_time"
    ),
    "a ledger that refuses": "core/kv/test_ledger.py::test_who_is_refused_is_charged_nothing",
    "32k of context, all but 500 tokens cached, and 1 s": (
        "runtime/requests/test_lengths_in.py::test_a_conversation_in_the_cache_keeps_its_limit"
    ),
    "a prefix that is cached after they came": "twin/sim/test_prefix_cached_later.py",
    "figures of a class that has gone quiet": (
        "observe/test_metrics.py::test_a_quiet_class_has_no_attainment_two_hours_later"
    ),
    "planning that always fails, in the twin": "twin/sim/test_stock_fallback.py",
    "no prediction of lengths": (
        "runtime/requests/test_lengths_in.py::test_without_prediction_nothing_is_learnt_however_much_has_finished"
    ),
    "load of an almost idle server": (
        "core/test_load.py::test_a_server_on_which_nobody_waits_is_not_loaded_however_few_requests_come"
    ),
    "the cost of packing": "core/test_packing.py::test_packing_only_changes_the_order",
    "tokenizer workers that start on a busy machine": (
        "server_edge/test_workers.py::test_workers_are_given_time_to_start_unless_the_operator_says_how_much"
    ),
    "one of a list for each of several prompts (`top_logprobs_num`), with one prompt alone": (
        "server_edge/test_wire.py::test_what_the_scheduler_could_not_read_or_survive_is_refused_by_name"
    ),
    "a number that no tensor holds (`top_k`), which took the neighbours in its batch with it": (
        "server_edge/test_wire.py::test_what_the_scheduler_could_not_read_or_survive_is_refused_by_name"
    ),
    "a prompt without tokens, alone in its batch": (
        "runtime/scheduler/test_trouble.py::test_a_prompt_without_tokens_is_refused_and_takes_nobody_with_it"
    ),
    "an exception while a row is written": (
        "core/test_table.py::test_a_row_that_cannot_be_written_is_not_taken"
    ),
    "requests that stock scheduling began while rows could not be given": (
        "runtime/scheduler/test_trouble.py::test_who_was_begun_without_a_row_has_one_as_soon_as_rows_can_be_given"
    ),
    "a prompt set aside and begun again by stock scheduling while a piece of it is in flight": (
        "runtime/kv/test_park.py::test_one_that_stock_scheduling_begins_again_at_once_has_stocks_tokens"
    ),
    "a prompt that shares a beginning, admitted before its turn to be looked up again": (
        "runtime/scheduler/test_planning.py::test_one_that_was_admitted_before_its_turn_to_be_looked_up_is_left_alone"
    ),
    "a body so deep that SGLang cannot quote it": (
        "server_edge/test_ingress.py::test_a_body_too_deep_to_be_quoted_is_a_400"
    ),
    "a request log with paces and percentiles, replayed in the twin": (
        "twin/workloads/test_traces.py::test_every_promise_that_a_server_logs_is_replayed"
    ),
}
