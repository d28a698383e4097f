"""Layer-wise transfer: the prompt (1) computes layers and sends each as it is final."""

import time

from common import Tensors, arguments, barrier, base_config, rank_table

from llm_datadist import (
    BlocksCacheKey,
    CacheDesc,
    DataType,
    LayerSynchronizer,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
    TransferWithCacheKeyConfig,
)


class Compute(LayerSynchronizer):
    """Stands for a model: makes the two tensors of a layer."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def synchronize_layer(self, layer_index, timeout_in_millis):
        for tensor in self.tensors.all[2 * layer_index : 2 * layer_index + 2]:
            tensor[:] = 7.0 + layer_index
        return True


args = arguments()
prompt = args.cluster_id == 1
config = base_config(enable_cache_manager=True, enable_remote_cache_accessible=True)
datadist = LLMDataDist(LLMRole.PROMPT if prompt else LLMRole.DECODER, args.cluster_id)
datadist.init(config.generate_options())
tensors = Tensors(args.tensors, 8, (10, 64), 100.0)
cache = datadist.cache_manager.register_blocks_cache(
    CacheDesc(8, [10, 64], DataType.DT_FLOAT), tensors.addresses, BlocksCacheKey(args.cluster_id, 0)
)
comm_id = datadist.link("link", {1: 0, 2: 1}, rank_table())
while datadist.query_register_mem_status(comm_id) != RegisterMemStatus.OK:
    time.sleep(0.05)
if prompt:
    target = TransferWithCacheKeyConfig(BlocksCacheKey(2, 0), range(4), range(4))
    task = datadist.cache_manager.transfer_cache_async(cache, Compute(tensors), [target])
    assert task.get_results() == [LLMStatusCode.LLM_SUCCESS]
    assert task.synchronize() == LLMStatusCode.LLM_SUCCESS
barrier(args, "sent")
assert [tensors.row(tensor, 9) for tensor in range(8)] == [7.0, 7.0, 8.0, 8.0, 9.0, 9.0, 10.0, 10.0]
datadist.unlink(comm_id)
datadist.finalize()
print("done")
