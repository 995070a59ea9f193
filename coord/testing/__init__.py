"""For an application's own tests: real servers, tasks that are performed in the test, and a proof under faults."""
