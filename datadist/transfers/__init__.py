"""Moving caches: plan, resolve, pull, push, layer by layer, copies, and comparing what arrived."""
