"""The whole library over RoCE on one host: the tests of core, with nodes on this transport."""

from __future__ import annotations

# ruff: noqa: F401 - pytest collects what is imported here
from tests.grants.test_ends import (
    test_a_lease_lapses_and_can_be_renewed,
    test_a_revoked_grant_is_not_read,
    test_granting_a_key_again_ends_the_earlier_grant,
    test_several_readers_each_count_once,
    test_the_pull_of_all_consumes,
)
from tests.links.test_clusters import (
    test_a_link_works_in_both_directions_at_once,
    test_a_live_link_is_reported_and_a_stale_half_replaced,
)
from tests.transfers.test_layerwise import (
    test_a_dead_target_ends_the_task,
    test_one_sided_slots,
    test_two_sided_slot_to_blocks,
)
from tests.transfers.test_parallel import (
    test_no_more_are_in_the_transport_than_it_permits,
    test_small_transfers_over_one_link_end_beside_one_that_goes_on,
)
from tests.transfers.test_pull import (
    test_all_ordered_pairs_of_four_clusters_and_two_domains,
    test_blocks_to_blocks,
    test_contiguous_to_blocks_with_a_short_last_block,
    test_memory_registered_after_link_needs_a_new_link,
    test_request_keys_are_consumed_and_prefix_keys_are_not,
    test_wrong_pulls_change_nothing,
)
from tests.transfers.test_push import (
    test_a_slot_is_pushed,
    test_blocks_are_pushed,
    test_freed_memory_is_not_pushed_into,
)
