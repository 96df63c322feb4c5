/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Settings fixed at load time, counting, addresses, and the records for telemetry. */
#pragma once

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <linux/bpf.h>
#include <linux/errno.h>
#include <linux/in.h>
#include <stdbool.h>

#include "mesh_maps.h"

/* A global function: of pointers to memory a kernel from 5.13 takes it. */
#ifdef NO_GLOBAL_FUNCTIONS
#define verified_once static __noinline
#else
#define verified_once __noinline
#endif

#define AF_INET	 2
#define AF_INET6 10

/* The instance that loaded the programs; read back by another one that finds them on a cgroup. */
const volatile char instance_name[32] = "default";
/* The network of a client whose namespace is not in `pods`. */
const volatile __u32 node_network = 0;
/* bpf_set_retval() is there (5.18): a refused connect() fails with ECONNREFUSED, else with EPERM. */
const volatile bool has_set_retval = true;
/* An endpoint that refused a connection is not drawn for so long, where there are others; 0: it is. */
const volatile __u64 shun_ns = 0;
/* Records for telemetry are written. */
const volatile bool has_telemetry = true;

static __always_inline void count(enum reason reason)
{
	__u32 index = reason;
	__u64 *counter = bpf_map_lookup_elem(&counters, &index);

	if (counter)
		(*counter)++;
}

static __always_inline struct ip ip_from_v4(__be32 address)
{
	return (struct ip){ .word = { 0, 0, bpf_htonl(0xffff), address } };
}

static __always_inline struct ip ip_from_v6(const struct bpf_sock_addr *ctx)
{
	return (struct ip){ .word = { ctx->user_ip6[0], ctx->user_ip6[1], ctx->user_ip6[2],
				      ctx->user_ip6[3] } };
}

static __always_inline void set_v6(struct bpf_sock_addr *ctx, const struct ip *address)
{
	ctx->user_ip6[0] = address->word[0];
	ctx->user_ip6[1] = address->word[1];
	ctx->user_ip6[2] = address->word[2];
	ctx->user_ip6[3] = address->word[3];
}

static __always_inline bool is_refusal(enum reason reason)
{
	return reason != REASON_ROUTED && reason != REASON_PASSTHROUGH;
}

static __always_inline bool ip_is_v4(const struct ip *address)
{
	return !address->word[0] && !address->word[1] && address->word[2] == bpf_htonl(0xffff);
}

/* Where a pod reaches itself, whatever the mesh says is there. No address at all means this too. */
static __always_inline bool ip_is_loopback(const struct ip *address)
{
	if (ip_is_v4(address))
		return bpf_ntohl(address->word[3]) >> 24 == 127 || !address->word[3];
	return !(address->word[0] | address->word[1] | address->word[2] | (address->word[3] & ~bpf_htonl(1)));
}

/* Without branches: the verifier would follow each of them, wherever addresses are compared. */
static __always_inline bool ip_equal(const struct ip *a, const struct ip *b)
{
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
		 (a->word[3] ^ b->word[3]));
}

static __always_inline struct flow_record *record_reserve(void)
{
	struct flow_record *record;

	if (!has_telemetry)
		return NULL;
	record = bpf_ringbuf_reserve(&flows, sizeof(*record), 0);
	if (!record)
		count(REASON_RECORD_LOST);
	else
		__builtin_memset(record, 0, sizeof(*record));
	return record;
}

/* The reader drains on a timer: waking it for each record would cost more than the connection. */
static __always_inline void record_submit(struct flow_record *record)
{
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

static __always_inline void count_open(const struct open_key *key)
{
	__u64 one = 1, *opened;

	if (!has_telemetry)
		return;
	opened = bpf_map_lookup_elem(&opens, key);
	if (!opened) {
		if (!bpf_map_update_elem(&opens, key, &one, BPF_NOEXIST))
			return;
		/* Another processor may have made the entry meanwhile. */
		opened = bpf_map_lookup_elem(&opens, key);
	}
	if (opened)
		(*opened)++;
	else
		count(REASON_OPEN_LOST);
}
