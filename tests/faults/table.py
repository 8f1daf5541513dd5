"""The table of 25 faults, by running them: `python -m tests.faults.table [--all]`.

Each row names the tests that inject its fault; what the table says of a row is what these tests did just now. `--all`
runs those that are marked slow or long too. Exit code 1: a test failed, or a row's tests did not run at all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

import pytest

SURVIVED, REFUSED = "survived", "refused"
ONE = "tests/faults/test_chaos.py::test_a_fault_costs_its_client_alone_in_its_round"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault: the node ids of the tests that inject it, how it must end, and what is then lost.

    `gap` says what of the fault no test injects; a row without a test says so there.
    """

    number: int
    fault: str
    tests: tuple[str, ...] = ()
    ends: str = SURVIVED
    lost: str = "nothing"
    gap: str = ""


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::{name}" for name in names)


def _chaos(*faults: str) -> tuple[str, ...]:
    return tuple(f"{ONE}[{fault}]" for fault in faults)


ITS_VISIT = "that client's visit"
ROWS = (
    Row(
        number=1, fault="a client is killed in mid-round", lost="its visit, or nothing where it is done again",
        tests=(
            *_of("faults/test_chaos", "test_processes_are_really_killed_and_the_run_is_that_of_one_process"),
            *_of("engines/test_forked", "test_work_lost_with_its_process_is_done_again_and_equals_one_process"),
            *_of("engines/test_flower_engine", "test_a_fault_costs_only_its_own_job"),
        ),
        gap="a device is played by what its transport reports; no real SuperNode is killed",
    ),
    Row(
        number=2, fault="the server is killed at any moment", lost="the round in hand, done again to the same bits",
        tests=_of(
            "faults/test_resume", "test_a_crash_at_every_place_of_a_commit", "test_crash_upon_crash",
            "test_twenty_kills_at_random_moments",
        ),
    ),
    Row(
        number=3, fault="SIGINT, SIGTERM, a second one", lost="the round in hand, done again to the same bits",
        tests=(
            *_of("faults/test_stops", "test_a_signal_ends_a_run_at_its_last_commit"),
            *_of("faults/test_stops", "test_a_second_one_waits_for_nothing"),
            *_of("faults/test_stops", "test_under_flower_both_ask_the_server_to_stop"),
            *_of("faults/test_resume", "test_a_real_sigint"),
        ),
    ),
    Row(
        number=4, fault="disk full, folder not writable", lost="the round in hand; of a client, its visit",
        tests=(
            *_of("faults/test_resume", "test_a_full_disk_leaves_the_last_commit"),
            *_of("test_store", "test_a_write_that_fails_leaves_the_old_file"),
            *_of("faults/test_resume", "test_a_folder_that_cannot_be_written_is_one_line"), *_chaos("disk_full"),
        ),
    ),
    Row(
        number=5, fault="a checkpoint, state, row or ticket is cut or flipped", lost="the last round, or that ticket",
        tests=(
            *_of("faults/test_resume", "test_damage_of_the_last_commit_costs_its_round"),
            *_of("faults/test_resume", "test_damage_of_both_commits_is_told_with_the_files_name"),
            *_of("faults/test_resume", "test_a_digit_that_changed_on_disk_is_seen"),
            *_of("test_tickets_file", "test_a_damaged_file_is_refused"),
            *_of("test_store", "test_every_flipped_bit_is_seen"), *_of("test_packs", "test_every_flipped_bit_is_seen"),
        ),
        gap="two commits are kept: what both need, and a ticket of a run that has ended, is refused by its name alone",
    ),
    Row(
        number=6, fault="an update of NaN or infinity", ends=REFUSED, lost=ITS_VISIT,
        tests=(
            *_chaos("nan", "huge"),
            *_of("faults/test_resume", "test_a_bad_reply_is_refused_recorded_and_costs_only_itself"),
            *_of("faults/test_hostile_replies", "test_hostile_replies_move_nothing_and_take_little_memory"),
            *_of("faults/test_absurd_numbers", "test_absurd_numbers_of_one_client_cost_it_alone"),
            *_of("faults/test_absurd_numbers", "test_the_first_round_of_a_hostile_federation_is_not_joined"),
        ),
    ),
    Row(
        number=7, fault="a weight of 0, below 0, NaN, true, or too large", ends=REFUSED, lost=ITS_VISIT,
        tests=(
            *_chaos("lie_about_counts"),
            *_of("faults/test_absurd_updates", "test_a_count_is_what_the_server_knows"),
        ),
    ),
    Row(
        number=8, fault="wrong shape, wrong keys, twice, of another round", ends=REFUSED, lost=ITS_VISIT,
        tests=(
            *_chaos("wrong_shape", "duplicate", "stale", "corrupt"),
            *_of("faults/test_door", "test_only_the_messages_that_were_asked_for_under_their_names"),
        ),
    ),
    Row(
        number=9, fault="a mask that is none: too long, a bomb, an empty layer", ends=REFUSED, lost=ITS_VISIT,
        tests=_of(
            "faults/test_hostile_masks", "test_a_mask_or_values_of_another_size_are_refused_in_little_memory",
            "test_a_layer_without_a_weight_moves_nothing_of_that_layer",
            "test_a_ticket_whose_mask_has_another_density_than_its_row_says_is_refused",
        ),
        gap="where a method lets clients choose how much they keep, the rounds have no band for it; an empty layer is "
        "accepted, and moves nothing",
    ),
    Row(
        number=10, fault="mask and values disagree", ends=REFUSED, lost=ITS_VISIT,
        tests=(
            *_of("wire/test_payload", "test_refused[popcount]"),
            *_of("wire/test_lossless", "test_values_of_more_or_fewer_weights_than_the_mask_keeps_are_refused"),
            *_of("faults/test_door", "test_an_update_lies_under_the_mask_of_what_was_sent"),
        ),
        gap="of the codec sign the number of values is known to the byte: up to seven too many or too few can pass",
    ),
    Row(
        number=11, fault="a coordinate that nobody holds",
        tests=(
            *_of("laws/test_aggregate", "test_count_mean_equals_brute_force"),
            *_of("laws/test_aggregate", "test_averaging_the_overlap_is_five_rules"),
            *_of("laws/test_aggregate", "test_trimmed_mean_and_median_equal_brute_force"),
        ),
    ),
    Row(
        number=12, fault="all clients of a round fail", lost="the round; after three in a row the run, with the reason",
        tests=(
            *_of("faults/test_chaos", "test_a_round_that_all_clients_fail_keeps_the_model"),
            *_of("faults/test_resume", "test_three_rounds_without_an_answer_end_the_run_with_its_reason"),
            *_of("engines/test_flower_rounds", "test_void_rounds_in_a_row_end_the_run_and_a_resume_continues"),
            *_of(
                "faults/test_absurd_updates", "test_a_global_model_that_nobody_can_train_is_rolled_back",
                "test_an_anchor_of_a_broken_model_is_rolled_back_too",
            ),
            *_of("faults/test_collapse", "test_an_attack_by_all_clients_is_undone"),
            *_of("faults/test_collapse", "test_the_undone_rounds_leave_nothing_with_anybody"),
        ),
        gap="where all answers are refused the model before it takes the round's place, although it may not be why",
    ),
    Row(
        number=13, fault="a straggler", lost=ITS_VISIT,
        tests=(
            *_chaos("delay"),
            *_of("engines/test_flower_rounds", "test_what_comes_after_the_deadline_is_counted_once_and_never_used"),
            *_of("engines/test_flower_rounds", "test_a_late_answer_is_a_row_of_its_own_round"),
            *_of("test_fleet", "test_a_reply_after_the_deadline_is_not_joined_and_costs_only_itself"),
            *_of("engines/test_flower_client", "test_a_step_that_hangs_is_given_up"),
            *_of("engines/test_pool", "test_every_client_lost_still_ends"),
        ),
    ),
    Row(
        number=14, fault="devices that never come", ends=REFUSED, lost="nothing: no run has begun",
        tests=(
            *_of("engines/test_flower_engine", "test_clients_without_a_node_are_named"),
            *_of("engines/test_flower_rounds", "test_fewer_than_the_quorum_are_named"),
            *_of("engines/test_flower_rounds", "test_a_silent_node_costs_nothing_after_the_first_time"),
            *_of("engines/test_flower_returns", "test_who_does_not_come_back_costs_the_wait_once"),
            *_of(
                "faults/test_absent_devices", "test_devices_that_do_not_say_whom_they_serve_make_no_quorum",
                "test_a_run_that_cannot_begin_leaves_no_folder",
                "test_a_run_whose_devices_all_leave_does_not_wait_for_ever",
            ),
        ),
    ),
    Row(
        number=15, fault="a device is wiped", lost="what was that client's alone; its mask is sent again, and counted",
        tests=(
            *_of("faults/test_devices", "test_a_device_that_is_wiped_gets_what_it_needs_again"),
            *_of("test_resync", "test_a_client_that_lost_its_mask_gets_it_back"),
        ),
    ),
    Row(
        number=16, fault="a client comes late, or is unseen",
        tests=_of(
            "test_newcomers", "test_a_late_joiner_begins_as_every_client_does",
            "test_a_late_joiner_begins_with_its_first_mask_where_a_method_has_one",
            "test_who_is_unseen_is_drawn_for_no_round_and_gets_a_ticket_all_the_same",
        ),
    ),
    Row(
        number=17, fault="a worker is out of memory", lost="that client's visit, or nothing where it is done again",
        tests=(
            *_of(
                "engines/test_pool", "test_work_lost_with_its_machine_is_done_again",
                "test_a_worker_goes_on_after_an_error_but_not_after_a_refused_allocation",
            ),
            *_of(
                "engines/test_forked", "test_a_faulty_client_costs_only_itself",
                "test_a_step_without_memory_is_told_apart_from_one_that_fails",
                "test_what_a_child_raises_outside_its_step_is_told",
            ),
            *_of("engines/test_ray", "TestOnOneRay::test_faulty_clients_cost_only_themselves"),
        ),
        gap="it is tried again as it was, up to three times, and not with fewer workers",
    ),
    Row(
        number=18, fault="a division of the data that cannot be", ends=REFUSED, lost="nothing: no run has begun",
        tests=(
            *_of("faults/test_small_clients", "test_a_division_that_cannot_be_ends_before_the_run_with_advice"),
            *_of("data/test_partition", "test_infeasible_skew_names_what_to_change", "test_infeasible_parts_say_why"),
            *_of("data/test_split", "test_impossible_splits_name_the_setting"),
            *_of("data/test_split", "test_a_client_with_a_single_example_is_named"),
        ),
    ),
    Row(
        number=19, fault="a client of no, one or two examples, or one class", lost="nothing; 0 and 1 are refused",
        tests=_of(
            "faults/test_small_clients", "test_one_class_and_a_last_batch_of_one_train_like_any_other",
            "test_a_client_of_two_examples_trains_on_one",
            "test_who_has_no_example_to_train_on_is_left_out_by_a_stated_rule",
        ),
        gap="who trains on one example fails each visit of a model that has a batch norm over the examples alone",
    ),
    Row(
        number=20, fault="clock skew, a partition served twice, a replay", ends=REFUSED, lost=ITS_VISIT,
        tests=(
            *_of("faults/test_devices", "test_a_message_that_comes_twice_counts_once"),
            *_of("faults/test_devices", "test_an_answer_replayed_under_another_rounds_message_is_refused"),
            *_of("faults/test_devices", "test_an_order_that_comes_twice_is_answered_alike"),
            *_of("engines/test_flower_rounds", "test_an_answer_that_comes_twice_counts_once"),
            *_of("engines/test_flower_client", "test_a_first_order_that_comes_twice_deletes_nothing"),
            *_of("engines/test_flower_engine", "test_partitions_must_be_served_once_each"),
            *_of("engines/test_flower_keys", "test_a_node_serves_the_client_of_its_key_alone"),
            *_of("faults/test_chaos", "test_what_cannot_be_written_is_refused[clock_skew]"),
        ),
        gap="nothing of ours compares clocks, so none is skewed; a device's signature is checked by Flower, not here",
    ),
    Row(
        number=21, fault="a thin link with losses and resets", lost="nothing; what broke off crosses again",
        tests=(
            *_of("deploy/test_thin_link", "test_a_link_that_is_reset_in_mid_message_costs_a_piece"),
            *_of("deploy/test_thin_link", "test_a_study_of_tickets_over_a_thin_link_that_loses_packets"),
            *_of("engines/test_flower_message", "test_a_payload_of_any_size_crosses_in_pieces_for_thin_links"),
            *_of("engines/test_flower_engine", "test_the_wait_for_an_answer_counts_with_what_a_link_takes"),
        ),
        gap="the study over a link that really loses packets needs root, a network namespace and tc, and --all",
    ),
    Row(
        number=22, fault="Byzantine clients", lost="little with a rule that bears them",
        tests=(
            *_of(
                "test_attack", "test_two_of_eight_against_each_rule",
                "test_sign_flip_hurts_the_mean_and_robust_rules_recover",
                "test_an_attack_that_nothing_bears_is_said_before_the_run",
            ),
            *_of("laws/test_aggregate", "test_a_minority_that_is_far_away_moves_nothing_far"),
            *_of("laws/test_aggregate", "test_no_client_weighs_more_for_its_examples"),
        ),
        gap="without a rule the run warns of an attack that the study plays; a real one is seen where it is absurd",
    ),
    Row(
        number=23, fault="client and server of different versions", ends=REFUSED, lost="that client, until mended",
        tests=(
            *_of("faults/test_devices", "test_another_version_is_told_at_the_roll_call"),
            *_of("faults/test_devices", "test_other_versions_are_refused_at_both_ends_and_both_are_named"),
            *_of("faults/test_devices", "test_a_run_with_one_device_of_another_version_says_so_and_goes_on"),
            *_of("faults/test_devices", "test_where_all_are_of_another_version_the_run_ends_and_says_which"),
            *_of("wire/test_payload", "test_refused[version]"),
        ),
        gap="a device from before the roll call told versions is found out by its first order",
    ),
    Row(
        number=24, fault="two runs in one folder", ends=REFUSED, lost="nothing",
        tests=(
            *_of(
                "faults/test_resume", "test_two_processes_cannot_run_one_folder",
                "test_a_lock_that_a_dead_runs_child_still_holds_is_waited_for",
                "test_a_run_that_has_ended_stays_as_it_is",
            ),
            *_of("faults/test_one_folder", "test_a_run_that_is_going_on_is_neither_resumed_nor_begun_again"),
            *_of("test_api", "test_one_lock_for_the_whole_folder"),
        ),
    ),
    Row(
        number=25, fault="other numbers of workers",
        tests=_of("engines/test_forked", "test_any_number_of_workers_equals_one_process"),
    ),
)  # fmt: skip


@dataclass
class Outcomes:
    """A pytest plugin that notes how each test ended: by node id, passed or not, and its seconds."""

    passed: dict[str, bool] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.skipped or (report.when != "call" and report.passed):
            return
        self.passed[report.nodeid] = report.passed and self.passed.get(report.nodeid, True)

    def of(self, test: str) -> list[bool]:
        """Return how the cases of a test ended; none where it did not run."""
        return [ok for node, ok in self.passed.items() if node == test or node.startswith(f"{test}[")]

    def spent(self, row: Row) -> float:
        """Return the seconds of a row's tests; one that several rows name counts in each."""
        return sum(s for node, s in self.seconds.items() for t in row.tests if node == t or node.startswith(f"{t}["))


def lines(rows: Sequence[Row], outcomes: Outcomes) -> Iterator[str]:
    """Yield the table, then what no test injects."""
    yield f"{'':2}  {'fault':<53} {'injected':>8}  {'outcome':<11} {'s':>6}  lost"
    for row in rows:
        found = [ok for test in row.tests for ok in outcomes.of(test)]
        injected = f"{sum(found)}/{len(found)}" if found else "-"
        yield (
            f"{row.number:2}  {row.fault:<53} {injected:>8}  {_outcome(row, found):<11} {outcomes.spent(row):6.1f}  "
            f"{row.lost if found and all(found) else '-'}"
        )
    covered = [row for row in rows if row.tests]
    ended = [found for row in covered if (found := [ok for test in row.tests for ok in outcomes.of(test)])]
    yield ""
    yield (
        f"{len(covered)} of {len(rows)} faults have tests; of {sum(map(len, ended))} injections "
        f"{sum(map(sum, ended))} ended as they must"
    )
    for row in rows:
        if row.gap:
            yield fill(f"{row.number:2}  {row.gap}", 118, subsequent_indent="    ")


def _outcome(row: Row, found: Sequence[bool]) -> str:
    if not row.tests:
        return "not covered"
    return "did not run" if not found else row.ends if all(found) else "FAILED"


def main(arguments: Sequence[str]) -> int:
    began, outcomes = time.monotonic(), Outcomes()
    every = ["-m", ""] if "--all" in arguments else []
    tests = dict.fromkeys(test for row in ROWS for test in row.tests)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--tb=short", "-n", "0", *every, *tests], plugins=[outcomes])
    print()
    print("\n".join(lines(ROWS, outcomes)))
    print(f"{time.monotonic() - began:.0f} s")
    ran = all(any(outcomes.of(test) for test in row.tests) for row in ROWS if row.tests)
    return 0 if code == 0 and ran else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
