"""Every planted bug is noticed: the kernels' tests would fail if the kernel were wrong.

Each emulator test program takes ``--plant=NAME`` and then runs the kernel with that mistake. It
must fail: with a wrong result or an exception in the plain build, or with a sanitizer's report.
"""

import pathlib
import subprocess

import pytest

CSRC = pathlib.Path("csrc")
GATHER = CSRC / "hidden_state_packing" / "gather_emulator_test"
PACK = CSRC / "hidden_state_packing" / "pack_emulator_test"
ROW_LOSSES = CSRC / "distillation_loss" / "row_losses_emulator_test"
MERGE = CSRC / "draft_attention" / "merge_emulator_test"
BUILD_TREE = CSRC / "tree_verification" / "build_tree_emulator_test"
VERIFICATION = CSRC / "tree_verification" / "verification_emulator_test"
EMULATOR = CSRC / "common" / "cuda_emulator_test"

# Program, suffix of the build, bug, what the failure says.
PLANTS = [
    (EMULATOR, "", "missing_barrier", "gave a wrong result"),
    (EMULATOR, "", "divergent_barrier", "deadlock"),
    (EMULATOR, "", "shared_overflow", "was noticed"),
    (EMULATOR, "_address", "shared_overflow", "AddressSanitizer"),
    (EMULATOR, "_address", "output_overflow", "AddressSanitizer"),
    (EMULATOR, "_address", "stack_overflow", "AddressSanitizer"),
    (EMULATOR, "_address", "misaligned_vector", "misaligned"),
    (EMULATOR, "_thread", "missing_barrier", "ThreadSanitizer: data race"),
    (EMULATOR, "_thread", "missing_barrier_hidden", "ThreadSanitizer: data race"),
    (GATHER, "", "ignores_row_stride", "gave a wrong result"),
    (GATHER, "", "wrong_layer_offset", "gave a wrong result"),
    (GATHER, "", "stops_after_one_row", "gave a wrong result"),
    (GATHER, "_address", "copies_past_the_row", "AddressSanitizer"),
    (GATHER, "_address", "skips_the_index_check", "AddressSanitizer"),
    (GATHER, "_thread", "all_warps_take_the_same_row", "ThreadSanitizer: data race"),
    (PACK, "", "pack_ignores_row_stride", "gave a wrong result"),
    (PACK, "", "pack_wrong_layer_offset", "gave a wrong result"),
    (PACK, "", "pack_stops_after_one_row", "gave a wrong result"),
    (PACK, "", "forgets_the_sign", "gave a wrong result"),
    (PACK, "", "forgets_the_last_warp", "gave a wrong result"),
    (PACK, "", "forgets_the_long_rows_end", "gave a wrong result"),
    (PACK, "", "reads_maxima_too_early", "gave a wrong result"),
    (PACK, "", "overwrites_maxima_too_early", "gave a wrong result"),
    (PACK, "", "scales_by_the_inverse", "gave a wrong result"),
    (PACK, "", "ignores_infinity", "gave a wrong result"),
    (PACK, "_address", "pack_goes_past_the_row", "AddressSanitizer"),
    (PACK, "_address", "pack_skips_the_index_check", "AddressSanitizer"),
    (PACK, "_thread", "reads_maxima_too_early", "ThreadSanitizer: data race"),
    (PACK, "_thread", "overwrites_maxima_too_early", "ThreadSanitizer: data race"),
    (PACK, "", "unpack_ignores_row_stride", "gave a wrong result"),
    (PACK, "", "unpack_wrong_layer_offset", "gave a wrong result"),
    (PACK, "", "unpack_stops_after_one_row", "gave a wrong result"),
    (PACK, "", "takes_the_first_layers_scale", "gave a wrong result"),
    (PACK, "", "ignores_the_index", "gave a wrong result"),
    (PACK, "_address", "unpack_goes_past_the_row", "AddressSanitizer"),
    (PACK, "_address", "unpack_skips_the_index_check", "AddressSanitizer"),
    (PACK, "_thread", "all_warps_take_the_same_row", "ThreadSanitizer: data race"),
    (ROW_LOSSES, "", "ignores_positions", "positions has an index out of range"),
    (ROW_LOSSES, "", "forgets_to_rescale", "gave a wrong result"),
    (ROW_LOSSES, "", "takes_the_last_of_equal_logits", "gave a wrong result"),
    (ROW_LOSSES, "", "reads_logits_after_they_are_gone", "gave a wrong result"),
    (ROW_LOSSES, "", "forgets_the_weight", "gave a wrong result"),
    (ROW_LOSSES, "", "stops_after_one_row", "gave a wrong result"),
    (ROW_LOSSES, "_address", "reads_past_the_row", "AddressSanitizer"),
    (ROW_LOSSES, "_thread", "reads_the_total_too_early", "ThreadSanitizer: data race"),
    (ROW_LOSSES, "_thread", "writes_places_too_early", "ThreadSanitizer: data race"),
    (MERGE, "", "forward_forgets_the_scale", "gave a wrong result"),
    (MERGE, "", "forward_takes_the_query_heads_keys", "gave a wrong result"),
    (MERGE, "", "forward_stops_after_one_unit", "gave a wrong result"),
    (MERGE, "", "forward_ignores_row_stride", "gave a wrong result"),
    (MERGE, "", "forgets_to_rescale", "gave a wrong result"),
    (MERGE, "", "starts_from_nothing", "gave a wrong result"),
    (MERGE, "", "forgets_the_logarithm", "gave a wrong result"),
    (MERGE, "_address", "forward_reads_past_the_head", "AddressSanitizer"),
    (MERGE, "_thread", "all_warps_take_the_same_unit", "ThreadSanitizer: data race"),
    (MERGE, "", "backward_forgets_the_scale", "gave a wrong result"),
    (MERGE, "", "backward_takes_the_query_heads_keys", "gave a wrong result"),
    (MERGE, "", "backward_stops_after_one_unit", "gave a wrong result"),
    (MERGE, "", "backward_ignores_row_stride", "gave a wrong result"),
    (MERGE, "", "forgets_delta", "gave a wrong result"),
    (MERGE, "", "overwrites_the_gradient", "gave a wrong result"),
    (MERGE, "", "keeps_only_the_last_head", "gave a wrong result"),
    (MERGE, "_address", "backward_reads_past_the_head", "AddressSanitizer"),
    (MERGE, "_thread", "reads_factors_too_early", "ThreadSanitizer: data race"),
    (MERGE, "_thread", "warps_share_factors", "ThreadSanitizer: data race"),
    (BUILD_TREE, "", "takes_the_later_of_equal_scores", "gave a wrong result"),
    (BUILD_TREE, "", "ignores_the_parents_score", "gave a wrong result"),
    (BUILD_TREE, "", "keeps_what_is_no_candidate", "gave a wrong result"),
    (BUILD_TREE, "", "sorts_by_score_alone", "gave a wrong result"),
    (BUILD_TREE, "", "forgets_the_node_itself", "gave a wrong result"),
    (BUILD_TREE, "", "sees_one_word_only", "gave a wrong result"),
    (BUILD_TREE, "", "links_nodes_of_other_parents", "gave a wrong result"),
    (BUILD_TREE, "", "stops_after_one_sequence", "gave a wrong result"),
    (BUILD_TREE, "_address", "writes_masks_past_the_tree", "AddressSanitizer"),
    (BUILD_TREE, "_thread", "counts_ranks_too_early", "ThreadSanitizer: data race"),
    (VERIFICATION, "_address", "summary_reads_past_the_row", "AddressSanitizer"),
    (VERIFICATION, "", "summary_takes_the_last_of_equal_logits", "gave a wrong result"),
    (VERIFICATION, "", "summary_forgets_the_temperature", "gave a wrong result"),
    (VERIFICATION, "", "summary_ignores_node_stride", "gave a wrong result"),
    (VERIFICATION, "", "summary_stops_after_one_unit", "gave a wrong result"),
    (VERIFICATION, "_thread", "reads_the_largest_too_early", "ThreadSanitizer: data race"),
    (VERIFICATION, "", "keeps_the_old_histogram", "gave a wrong result"),
    (VERIFICATION, "", "top_k_loses_ties", "gave a wrong result"),
    (VERIFICATION, "", "top_p_keeps_all_ties", "gave a wrong result"),
    (VERIFICATION, "", "top_p_ignores_top_k", "gave a wrong result"),
    (VERIFICATION, "_thread", "reads_the_histogram_too_early", "ThreadSanitizer: data race"),
    (VERIFICATION, "", "takes_the_last_equal_child", "gave a wrong result"),
    (VERIFICATION, "", "takes_another_nodes_child", "gave a wrong result"),
    (VERIFICATION, "", "leaves_the_end_of_the_path", "gave a wrong result"),
    (VERIFICATION, "", "stops_after_one_sequence", "gave a wrong result"),
    (VERIFICATION, "_address", "reads_past_the_tree", "AddressSanitizer"),
    (VERIFICATION, "", "takes_the_last_equal_chunk", "gave a wrong result"),
    (VERIFICATION, "", "ignores_the_last_chunk", "gave a wrong result"),
    (VERIFICATION, "", "forgets_to_rescale_chunks", "gave a wrong result"),
    (VERIFICATION, "", "draws_from_the_first_chunk", "gave a wrong result"),
    (VERIFICATION, "", "forgets_the_threads_before", "gave a wrong result"),
    (VERIFICATION, "_address", "draws_past_the_row", "AddressSanitizer"),
    (VERIFICATION, "_thread", "reads_masses_too_early", "ThreadSanitizer: data race"),
    (VERIFICATION, "", "accepts_with_the_unscaled_ratio", "gave a wrong result"),
    (VERIFICATION, "", "forgets_the_rejection", "gave a wrong result"),
    (VERIFICATION, "", "keeps_q_of_the_seen", "gave a wrong result"),
    (VERIFICATION, "", "tests_with_the_roots_number", "gave a wrong result"),
    (VERIFICATION, "", "keeps_the_residual_of_the_parent", "gave a wrong result"),
    (VERIFICATION, "", "residual_of_another_node", "gave a wrong result"),
    (VERIFICATION, "", "residual_forgets_q", "gave a wrong result"),
    (VERIFICATION, "_address", "residual_reads_past_the_row", "AddressSanitizer"),
    (VERIFICATION, "", "residual_of_the_first_chunk", "gave a wrong result"),
    (VERIFICATION, "", "residual_skips_sequences", "gave a wrong result"),
]


@pytest.mark.parametrize(("program", "build", "bug", "report"), PLANTS)
def test_a_planted_bug_is_noticed(program: pathlib.Path, build: str, bug: str, report: str) -> None:
    command = [f"{program}{build}", f"--plant={bug}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    output = process.stdout + process.stderr
    assert process.returncode != 0, f"{bug} went unnoticed:\n{output}"
    assert report in output, output
