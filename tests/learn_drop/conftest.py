from memory_and_threads import no_memory, one_thread

__all__ = ["no_memory", "one_thread"]
