-- The ledger as version 1 has made it, which versions since then bring up to date.

CREATE TABLE coord_jobs (
	id UUID NOT NULL, 
	task TEXT NOT NULL, 
	queue TEXT NOT NULL, 
	arguments JSON NOT NULL, 
	state VARCHAR(9) DEFAULT 'queued' NOT NULL, 
	attempt INTEGER DEFAULT '1' NOT NULL, 
	attempts INTEGER, 
	timeout DOUBLE PRECISION, 
	unique_key TEXT, 
	due_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	started_at TIMESTAMP WITH TIME ZONE, 
	finished_at TIMESTAMP WITH TIME ZONE, 
	error TEXT, 
	traceback TEXT, 
	result JSON, 
	trace JSON, 
	PRIMARY KEY (id), 
	CONSTRAINT coord_jobs_state CHECK (state IN ('queued', 'done', 'failed', 'cancelled'))
)
 WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_scale_factor = 0.02);

CREATE UNIQUE INDEX coord_jobs_unique ON coord_jobs (task, unique_key) WHERE state = 'queued' AND unique_key IS NOT NULL;

CREATE INDEX coord_jobs_queued ON coord_jobs (id) WHERE state = 'queued';

CREATE INDEX coord_jobs_failed ON coord_jobs (id) WHERE state = 'failed';

CREATE TABLE coord_workers (
	id UUID NOT NULL, 
	queue TEXT NOT NULL, 
	host TEXT NOT NULL, 
	pid INTEGER NOT NULL, 
	started_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	beat_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	beats INTEGER DEFAULT '1' NOT NULL, 
	jobs JSON NOT NULL, 
	PRIMARY KEY (id)
)
 WITH (fillfactor = 50, autovacuum_vacuum_threshold = 200);

CREATE TABLE coord_cancellations (
	job_id UUID NOT NULL, 
	requested_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL, 
	PRIMARY KEY (job_id)
);

CREATE TABLE coord_idempotency_keys (
	scope TEXT NOT NULL, 
	key TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	job_id UUID, 
	expires_at TIMESTAMP WITH TIME ZONE NOT NULL, 
	PRIMARY KEY (scope, key)
);

CREATE INDEX coord_idempotency_keys_expiry ON coord_idempotency_keys (expires_at);

CREATE TABLE coord_schema (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
);

INSERT INTO coord_schema (version) VALUES (1);
