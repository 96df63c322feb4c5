/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * sockops and cgroup/sock_release: one record for each socket of an enrolled pod at its close, TCP
 * by its state changes (failed connects too), UDP when it is released. Opens are counted, not sent.
 * Keeps `loads` and `shunned`, by which endpoints are drawn, and tells waypoints what a connection is for
 * (waypoint.h, handoff_option.h), also where nothing is recorded.
 * Decides nothing: traffic goes on whatever fails here, and what is lost is counted.
 */
#pragma once

#include <bpf/bpf_core_read.h>

#include "connect.h"
#include "handoff_option.h"
#include "kernel_types.h"
#include "sockops.h"

static __always_inline struct socket_state *sockops_state(struct bpf_sock_ops *ops, __u64 flags)
{
	struct bpf_sock *sk = ops->sk;

	return sk ? bpf_sk_storage_get(&sockets, sk, 0, flags) : NULL;
}

static __always_inline void follow(struct bpf_sock_ops *ops, enum direction direction)
{
	struct socket_state *state = sockops_state(ops, BPF_SK_STORAGE_GET_F_CREATE);

	if (!state) {
		count(REASON_STATE_LOST);
		return;
	}
	state->direction = direction;
	state->established = direction == DIRECTION_INBOUND;
	state->opened_ns = bpf_ktime_get_ns();
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* One more open connection to the socket's endpoint, or one less. */
static __always_inline void balance(struct socket_state *state, __s64 step)
{
	struct destination endpoint = { .address = state->endpoint, .port = state->endpoint_port };
	struct peer_key key = peer_of(&endpoint);
	__s64 none = 0, *load = bpf_map_lookup_elem(&loads, &key);

	if (!load && step > 0) {
		bpf_map_update_elem(&loads, &key, &none, BPF_NOEXIST);
		load = bpf_map_lookup_elem(&loads, &key);
	}
	if (load)
		__sync_fetch_and_add(load, step);
}

/* To a waypoint of this node, or, where its front is none of this node's, of another one. */
static __always_inline void hand_over(struct bpf_sock_ops *ops, struct bpf_sock *sk,
				      const struct socket_state *state)
{
	struct handoff_key ends = { .client = sockops_local(ops),
				    .waypoint = state->endpoint,
				    .client_port = bpf_htons(ops->local_port),
				    .waypoint_port = state->endpoint_port };
	struct handoff_value asked = {};

	if (!ask(sk, state, &asked))
		return;
	if (is_front_here(&ends) || !make_claim(ops, sk, &ends, &asked))
		note_handoff(&ends, &asked);
}

static __always_inline void connecting(struct bpf_sock_ops *ops)
{
	struct socket_state *state = sockops_state(ops, 0);

	drop_claim(ops); /* one that came to nothing: the socket connects again, elsewhere perhaps */
	if (!state || !state->service)
		return;
	if (state->handed_over && ops->sk)
		hand_over(ops, ops->sk, state);
	if (state->balanced == BALANCED_WANTED) {
		balance(state, 1);
		state->balanced = BALANCED_COUNTED;
	}
	if (shun_ns || state->balanced)
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

static __always_inline void disconnected(struct bpf_sock_ops *ops)
{
	struct socket_state *state = sockops_state(ops, 0);
	struct bpf_sock *sk = ops->sk;
	struct tcp_sock *tcp;

	if (!state || !sk)
		return;
	if (state->balanced == BALANCED_COUNTED) {
		balance(state, -1);
		state->balanced = BALANCED_NOT;
	}
	if (!state->service)
		return;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (shun_ns && tcp && ops->args[0] == BPF_TCP_SYN_SENT &&
	    BPF_CORE_READ((struct sock *)tcp, sk_err) == ECONNREFUSED) {
		struct destination endpoint = { .address = state->endpoint, .port = state->endpoint_port };
		struct peer_key key = peer_of(&endpoint);
		__u64 until_ns = bpf_ktime_get_ns() + shun_ns;

		bpf_map_update_elem(&shunned, &key, &until_ns, BPF_ANY);
	}
}

static __always_inline void count_tcp_open(struct bpf_sock_ops *ops, struct socket_state *state)
{
	struct open_key key = { .local = sockops_local(ops),
				.remote = sockops_remote(ops),
				.service = state->service,
				.direction = state->direction,
				.protocol = IPPROTO_TCP };

	count_open(&key);
}

static __always_inline void opened(struct bpf_sock_ops *ops)
{
	struct socket_state *state = sockops_state(ops, 0);

	if (!state)
		return;
	state->established = 1;
	/* A socket connected again, elsewhere and past the mesh, keeps no service. */
	if (state->service) {
		struct ip remote = sockops_remote(ops);

		if (!ip_equal(&remote, &state->endpoint) || sockops_remote_port(ops) != state->endpoint_port)
			state->service = 0;
	}
	count_tcp_open(ops, state);
}

static __always_inline void fill_traffic(struct flow_record *record, struct bpf_sock *sk)
{
	struct tcp_sock *tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	unsigned long flags;

	if (!tcp)
		return;
	flags = BPF_CORE_READ((struct sock *)tcp, __sk_common.skc_flags);
	record->error = BPF_CORE_READ((struct sock *)tcp, sk_err);
	record->sent_bytes = BPF_CORE_READ(tcp, bytes_sent) - BPF_CORE_READ(tcp, bytes_retrans);
	record->received_bytes = BPF_CORE_READ(tcp, bytes_received);
	/* The kernel counts the peer's FIN as a byte (net/ipv4/tcp_input.c, tcp_rcv_nxt_update). */
	if (record->received_bytes && (flags & SOCK_DONE_BIT))
		record->received_bytes--;
}

static __always_inline void closed(struct bpf_sock_ops *ops)
{
	struct socket_state *state = sockops_state(ops, 0);
	struct flow_record *record;
	struct bpf_sock *sk = ops->sk;

	if (!state || !state->direction || !sk)
		return;
	record = record_reserve();
	if (!record) {
		state->direction = 0;
		return;
	}
	record->kind = FLOW_CLOSED;
	record->protocol = IPPROTO_TCP;
	record->direction = state->direction;
	record->established = state->established;
	record->opened_ns = state->opened_ns;
	record->closed_ns = bpf_ktime_get_ns();
	record->local = sockops_local(ops);
	record->remote = sockops_remote(ops);
	record->local_port = bpf_htons(ops->local_port);
	record->remote_port = sockops_remote_port(ops);
	record->srtt_us = ops->srtt_us >> 3;
	record->retransmits = ops->total_retrans;
	if (state->service && ip_equal(&record->remote, &state->endpoint) &&
	    record->remote_port == state->endpoint_port) {
		record->service = state->service;
		record->vip = state->vip;
		record->vip_port = state->vip_port;
	}
	fill_traffic(record, sk);
	record_submit(record);
	state->direction = 0;
}

SEC("sockops")
int pykmesh_sockops(struct bpf_sock_ops *ops)
{
	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (has_telemetry)
			follow(ops, DIRECTION_OUTBOUND);
		connecting(ops);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (has_telemetry) {
			follow(ops, DIRECTION_INBOUND);
			opened(ops);
		}
		break;
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
		claim_reserved(ops);
		break;
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
		claim_written(ops);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		drop_claim(ops);
		if (has_telemetry)
			opened(ops);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] != BPF_TCP_CLOSE)
			break;
		disconnected(ops);
		if (has_telemetry)
			closed(ops);
		break;
	}
	return 1;
}

SEC("cgroup/sock_release")
int pykmesh_release(struct bpf_sock *sk)
{
	struct socket_state *state;
	struct flow_record *record;
	const struct pod_value *pod;

	if (sk->protocol != IPPROTO_UDP)
		return 1;
	state = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!state || !state->service)
		return 1;
	pod = client_of(sk).pod;
	record = record_reserve();
	if (!record)
		return 1;
	record->kind = FLOW_CLOSED;
	record->protocol = IPPROTO_UDP;
	record->direction = DIRECTION_OUTBOUND;
	record->established = 1;
	record->opened_ns = state->opened_ns;
	record->closed_ns = bpf_ktime_get_ns();
	/* A socket that is being released shows its own address to no program: the pod's stands for it. */
	if (pod)
		record->local = ip_is_v4(&state->endpoint) ? pod->address4 : pod->address6;
	record->remote = state->endpoint;
	record->remote_port = state->endpoint_port;
	record->vip = state->vip;
	record->vip_port = state->vip_port;
	record->service = state->service;
	record_submit(record);
	return 1;
}
