/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * syscall: writes records and counts opens by the same helpers as the programs, without a network.
 * Run by BPF_PROG_TEST_RUN, on the maps that the test has pinned. Records are numbered in retransmits.
 */
#include <linux/types.h>

#include "../../bpf/mesh_helpers.h"

enum emit_mode {
	EMIT_RECORDS = 0,
	EMIT_OPENS = 1,
	EMIT_DISCARDS = 2, /* reserved and thrown away: what a reader must pass over */
	EMIT_SHORT = 3,	   /* of another size */
};

struct emit_request {
	__u64 first;
	__u32 count;
	__u32 mode;
	__u32 pairs; /* the remote addresses that are used in turn */
	__u32 kind;
	__u32 direction;
	__u32 protocol;
	__u32 established;
	__u32 reason;
	__u64 service;
	__u64 opened_ns; /* 0: now */
	__u64 written;	 /* out */
};

static __always_inline struct ip emit_remote(const struct emit_request *request, __u64 number)
{
	__u32 pairs = request->pairs ? request->pairs : 1;

	return ip_from_v4(bpf_htonl(0x0a010000 | (__u32)(number % pairs)));
}

static __always_inline void emit_record(struct emit_request *request, __u64 number)
{
	struct flow_record *record = record_reserve();

	if (!record)
		return;
	record->closed_ns = bpf_ktime_get_ns();
	record->opened_ns = request->opened_ns ? request->opened_ns : record->closed_ns;
	record->retransmits = number;
	record->service = request->service;
	record->sent_bytes = 10;
	record->received_bytes = 1000;
	record->local = ip_from_v4(bpf_htonl(0x0a000001));
	record->remote = emit_remote(request, number);
	record->local_port = bpf_htons(40000);
	record->remote_port = bpf_htons(8080);
	record->kind = request->kind;
	record->direction = request->direction;
	record->protocol = request->protocol;
	record->established = request->established;
	record->reason = request->reason;
	record_submit(record);
	request->written++;
}

static __always_inline void emit_open(struct emit_request *request, __u64 number)
{
	struct open_key key = { .local = ip_from_v4(bpf_htonl(0x0a000001)),
				.remote = emit_remote(request, number),
				.service = request->service,
				.direction = request->direction,
				.protocol = request->protocol };

	count_open(&key);
	request->written++;
}

static __always_inline void emit_odd(struct emit_request *request)
{
	void *record;

	if (request->mode == EMIT_DISCARDS) {
		record = bpf_ringbuf_reserve(&flows, sizeof(struct flow_record), 0);
		if (record)
			bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		return;
	}
	record = bpf_ringbuf_reserve(&flows, 24, 0);
	if (record) {
		__builtin_memset(record, 0, 24);
		bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	}
}

static long emit_one(__u32 index, struct emit_request **context)
{
	struct emit_request *request = *context;

	if (request->mode == EMIT_RECORDS)
		emit_record(request, request->first + index);
	else if (request->mode == EMIT_OPENS)
		emit_open(request, request->first + index);
	else
		emit_odd(request);
	return 0;
}

SEC("syscall")
int pykmesh_emit(struct emit_request *request)
{
	bpf_loop(request->count, emit_one, &request, 0);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
