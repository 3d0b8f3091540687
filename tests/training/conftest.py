from memory_and_threads import no_memory, one_thread
from own_cache import own_cache

__all__ = ["no_memory", "one_thread", "own_cache"]
